"""Calibration's sums against loops over tokens in the whole model, and the one file they are kept in."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_stream import FOLLOWED
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import tiny
from coterie.errors import CoterieError
from coterie.forward import samples as samples_module
from coterie.forward.measure import measure
from coterie.forward.samples import Calibration, compute_dtype, max_positions, read_samples
from coterie.model import stats as stats_module
from coterie.model.experts import read_layer
from coterie.model.layer import Model
from coterie.model.loading import load_stock
from coterie.model.stats import SUMS, Stats, merge
from coterie.reference_model import CALIBRATION
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.collect import collect

LENGTHS = {"prose": (9, 24, 9), "code": (5,), "a/b": (24, 1)}


def sequences(seed=0):
    draw = np.random.default_rng(seed)
    return {name: [tuple(draw.integers(3, tiny.VOCABULARY, n).tolist()) for n in ns] for name, ns in LENGTHS.items()}


def files(folder, given):
    """One JSONL file of token ids per domain."""
    folder.mkdir(exist_ok=True)
    found = {}
    for number, (name, samples) in enumerate(given.items()):
        found[name] = folder / f"{number}.jsonl"
        found[name].write_text("\n".join(json.dumps({"input_ids": list(s)}) for s in samples))
    return found


# --- the slow way -------------------------------------------------------------------------------------------------


def silu_hidden(module, e, x):
    gate, up = (module.gate_up_proj[e] @ x).chunk(2)
    return F.silu(gate) * up


def silu_output(module, e, h):
    return module.down_proj[e] @ h


def gpt_oss_hidden(module, e, x):
    """Stored (in, out), gate and up alternating, clamped at 7; the activation is x sigmoid(1.702 x)."""
    both = x @ module.gate_up_proj[e] + module.gate_up_proj_bias[e]
    gate, up = both[0::2].clamp(max=7), both[1::2].clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def gpt_oss_output(module, e, h):
    return h @ module.down_proj[e] + module.down_proj_bias[e]


def slow_sums(folder, given):
    """{(domain, layer, name): (2, ...)} by the stock model, one sample, one token, one choice after the other."""
    model, _ = load_stock(folder, "float32", experts_implementation="eager")
    is_gpt = model.config.model_type == "gpt_oss"
    to_hidden, to_output = (gpt_oss_hidden, gpt_oss_output) if is_gpt else (silu_hidden, silu_output)
    layer_of = {m: str(i) for i, layer in enumerate(model.model.layers) for m in layer.modules()}
    source = Model.open(folder)
    routers = {b.key: read_layer(source.checkpoint, b).router for b in source.main}
    biases = {b.key: source.checkpoint.read(b.rows[0]) if is_gpt else 0 for b in source.main}  # others only select
    sums, domain, half = {}, "", 0

    def add(layer, name, value, *place):
        shape = {"coactivation": (8, 8), "num_tokens": ()}.get(name, (8, *np.shape(value)))
        array = sums.setdefault((domain, layer, name), np.zeros((2, *shape)))
        array[half, *place] = stats_module.joined(name)(array[half, *place], np.asarray(value, dtype=np.float64))

    def experts(module, tokens, chosen, weights):
        layer, total = layer_of[module], torch.zeros_like(tokens)
        for t, x in enumerate(tokens):
            ids = chosen[t].tolist()
            add(layer, "num_tokens", 1)
            for e, z in enumerate(routers[layer] @ x.numpy() + biases[layer]):
                add(layer, "logits", z, e)
                add(layer, "logits_squared", z**2, e)
            for k, e in enumerate(ids):
                g, h = float(weights[t, k]), to_hidden(module, e, x)
                y = to_output(module, e, h)
                total[t] += weights[t, k] * y
                x64, h64, y64 = (v.double().numpy() for v in (x, h, y))
                add(layer, "tokens", 1, e)
                add(layer, "gates", g, e)
                add(layer, "output_norms", np.linalg.norm(y64), e)
                add(layer, "gated_output_norms", g * np.linalg.norm(y64), e)
                add(layer, "output_norms_squared", np.sum(y64**2), e)
                add(layer, "output_max", np.abs(y64).max(), e)
                add(layer, "inputs_squared", x64**2, e)
                add(layer, "gated_inputs_squared", (g * x64) ** 2, e)
                add(layer, "hidden_squared", h64**2, e)
                add(layer, "gated_hidden_squared", (g * h64) ** 2, e)
                add(layer, "outputs", y64, e)
                for other in ids:
                    add(layer, "coactivation", int(e != other), e, other)
        return total

    ALL_EXPERTS_FUNCTIONS.register("slow", experts)
    model.set_experts_implementation("slow")
    with torch.inference_mode():
        for name, samples in given.items():
            domain = name
            for number, sample in enumerate(samples):
                half = number % 2
                model(input_ids=torch.tensor([sample]), use_cache=False)
    return sums


def assert_close(found, expected):
    """Equal to 1e-5 of the largest value of each sum; counts exactly."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key[2] in ("num_tokens", "tokens", "coactivation"):
            assert np.array_equal(found[key], value), key
        else:
            np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-5 * np.abs(value).max(), err_msg=str(key))


def totals(stats):
    """Both halves together."""
    return {key: stats_module.joined(key[2]).reduce(value) for key, value in stats.sums.items()}


@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_sums_equal_loops_over_tokens(tiny_checkpoint, model_type):
    """Every sum of every MoE layer, domain and half, though all samples pass through the model together."""
    folder, given = tiny_checkpoint(model_type), sequences()
    found = measure(Model.open(folder), given, torch.float32)
    assert_close(found.sums, slow_sums(folder, given))
    assert found.samples == {name: len(s) for name, s in given.items()}
    assert {name for _, _, name in found.sums} == set(SUMS)
    tokens = found.get(found.layers[0], "tokens")
    assert tokens.sum() == tiny.TOP_K * sum(sum(n) for n in LENGTHS.values())


def test_shapes_are_as_documented(tiny_checkpoint):
    """Two halves, E 8, D 32, F 16; dense layers have no sums."""
    found = measure(Model.open(tiny_checkpoint("deepseek_v3")), sequences(), torch.float32)
    axes = {"E": tiny.NUM_EXPERTS, "D": tiny.HIDDEN, "F": tiny.EXPERT_HIDDEN}
    assert found.layers == ["1", "2", "3"]
    for (_, _, name), value in found.sums.items():
        assert value.shape == (2, *(axes[a] for a in SUMS[name][0])), name
        assert value.dtype == np.float64
    pairs = found.get("1", "coactivation")
    assert np.array_equal(pairs, pairs.T) and not np.diag(pairs).any()


def test_padding_never_enters(tiny_checkpoint):
    """Samples of different lengths count as many tokens as they have, however they share batches."""
    model = Model.open(tiny_checkpoint("qwen2_moe"))
    together = measure(model, sequences(), torch.float32)
    apart = merge(
        measure(model, {name: [sample]}, torch.float32) for name, given in sequences().items() for sample in given
    )
    assert_close(totals(together), totals(apart))
    assert together.samples == apart.samples


@pytest.mark.parametrize("model_type", FOLLOWED)
def test_logits_are_the_routers(tiny_checkpoint, model_type):
    """In every family: W x + b, x what the router sees (normalised, in gemma4), b its own bias (in gpt_oss), all times
    what the router multiplies them by (muse_spark). LongCat never calls the module that holds its rows: it says so."""
    folder, sample = tiny_checkpoint(model_type), sequences()["prose"][0]
    model, source = load_stock(folder, "float32", experts_implementation="eager")[0], Model.open(folder)
    rows = {b.key: torch.tensor(read_layer(source.checkpoint, b).router) for b in source.main}
    seen = {}
    for module in model.modules():
        for router in module.parameters(recurse=False):
            for key in [k for k, w in rows.items() if w.shape == router.shape and torch.equal(w, router)]:
                bias = 0 if getattr(module, "bias", None) is None else module.bias.detach().double()
                times = getattr(module, "output_multiplier", 1.0)
                module.register_forward_pre_hook(
                    lambda _, args, key=key, bias=bias, times=times: seen.update({
                        key: args[0].detach().double().reshape(-1, rows[key].shape[1])
                        @ (rows[key].double().T * times) + bias
                    })
                )  # fmt: skip
    with torch.inference_mode():
        model(input_ids=torch.tensor([sample]), use_cache=False)
    found = measure(source, {"x": [sample]}, torch.float32)
    if model_type == "longcat_flash":
        assert len(found.notes) == len(rows) and all("could not be seen" in note for note in found.notes)
        return
    assert found.notes == [] and seen.keys() == rows.keys()
    for key, z in seen.items():
        for name, expected in (("logits", z.sum(0)), ("logits_squared", z.square().sum(0))):
            np.testing.assert_allclose(found.get(key, name), expected, rtol=1e-3, atol=1e-3 * float(z.abs().max()))


def test_mean_and_variance_of_logits_follow(tiny_checkpoint):
    """The mean of z is its sum over the number of tokens, the variance that of z^2 less the mean's square."""
    found = measure(Model.open(tiny_checkpoint("mixtral")), sequences(), torch.float32)
    n = found.get("2", "num_tokens")
    assert n == sum(sum(ns) for ns in LENGTHS.values())
    assert (found.get("2", "logits_squared") / n >= (found.get("2", "logits") / n) ** 2).all()


@pytest.mark.parametrize("instead", [lambda z: None, lambda z: z[:, :5], lambda z: z[1:]])
def test_logits_that_cannot_be_seen_are_left_out_and_said(tiny_checkpoint, tmp_path, monkeypatch, instead):
    """A router that shows something else: no wrong numbers, a note in the file, and a refusal where they are asked."""
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter as Router

    forward = Router.forward

    def other(self, x):
        logits, *rest = forward(self, x)
        return instead(logits), *rest

    monkeypatch.setattr(Router, "forward", other)
    out = tmp_path / "x.stats"
    result = collect(tiny_checkpoint("qwen2_moe"), out, data=files(tmp_path / "data", sequences()))
    found, said = Stats.load(out), "layer 3: its router's logits could not be seen, and are left out"
    assert said in result["notes"] and said in found.notes and len(found.notes) == 4
    assert {name for _, _, name in found.sums} == set(SUMS) - {"logits", "logits_squared"}
    with pytest.raises(CoterieError, match=r"layer 3 has no 'logits' in the statistics; .*layer 3: its router's"):
        found.get("3", "logits")


def test_where_activations_are_kept_does_not_matter(tiny_checkpoint, tmp_path):
    """Mapped to files, layers run twice; every token, and every router's output, counts once all the same."""
    model = Model.open(tiny_checkpoint("qwen2_moe"))
    inside = measure(model, sequences(), torch.float32)
    outside = measure(model, sequences(), torch.float32, spill=tmp_path, budget=0)
    assert outside.notes == [] and inside.sums.keys() == outside.sums.keys()
    assert all(np.array_equal(value, outside.sums[key]) for key, value in inside.sums.items())


def test_halves_alternate_within_each_domain(tiny_checkpoint):
    """Half 0 has a domain's first, third, fifth sample, half 1 the others, whatever other domains hold."""
    model, given = Model.open(tiny_checkpoint("qwen2_moe")), sequences()
    found = measure(model, given, torch.float32)
    for index in (0, 1):
        every_second = {name: samples[index::2] for name, samples in given.items() if samples[index::2]}
        expected, half = measure(model, every_second, torch.float32), found.half(index)
        for layer in found.layers:
            for name in SUMS:
                a, b = half.get(layer, name), expected.get(layer, name)
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


# --- the file -----------------------------------------------------------------------------------------------------


def test_the_file(tiny_checkpoint, tmp_path):
    """Names the model and the samples of each domain; reads back as it was, names with slashes included."""
    folder, given = tiny_checkpoint("qwen2_moe"), sequences()
    out, seen = tmp_path / "out" / "m.stats", []
    out.parent.mkdir()
    result = collect(
        folder, out, data=files(tmp_path / "data", given), samples=9,
        on_progress=lambda what, done, total: seen.append((what, done, total)),
    )  # fmt: skip
    found = Stats.load(out)
    assert found.model == result["model"]["hash"] == Checkpoint.open(folder).hash
    assert found.samples == {"prose": 3, "code": 1, "a/b": 2}
    assert result["domains"]["a/b"] == {"samples": 2, "tokens": 25}
    assert len(result["notes"]) == 3 and "gives 1 of the 3 samples" in result["notes"][1]
    assert seen == [("measuring layers", i, 4) for i in (1, 2, 3, 4)]
    assert [p.name for p in out.parent.iterdir()] == ["m.stats"]
    assert json.loads(json.dumps(result))["layers"] == ["0", "1", "2", "3"]
    assert_close(found.sums, measure(Model.open(folder), given, torch.float32).sums)


def test_two_files_add_up_to_one(tiny_checkpoint, tmp_path):
    """Statistics of two data sets merged are those of both together; of even numbers of samples, also half by half."""
    folder, given = tiny_checkpoint("mixtral"), sequences()
    parts = [{"x": given["prose"]}, {"x": given["code"], "y": given["a/b"]}]
    for number, part in enumerate([*parts, {"x": given["prose"] + given["code"], "y": given["a/b"]}]):
        total = sum(len(s) for s in part.values())
        data = files(tmp_path / str(number), part)
        collect(folder, tmp_path / f"{number}.stats", data=data, samples=total if len(part) == 1 else 2 * total)
    a, b, both = (Stats.load(tmp_path / f"{number}.stats") for number in range(3))
    before = {key: value.copy() for key, value in a.sums.items()}
    merged = merge([a, b])
    assert_close(totals(merged), totals(both))
    assert merged.samples == both.samples == {"x": 4, "y": 2}
    assert all(np.array_equal(a.sums[key], value) for key, value in before.items())
    model, x = Model.open(tiny_checkpoint("mixtral")), given["prose"] + given["code"]
    halves = merge(measure(model, {"x": part}, torch.float32) for part in (x[:2], x[2:]))
    assert_close(halves.sums, measure(model, {"x": x}, torch.float32).sums)


def test_weights_multiply_domains(tiny_checkpoint):
    """A domain of weight two counts as if its data were given twice; unnamed ones count once."""
    model, given = Model.open(tiny_checkpoint("qwen2_moe")), sequences()
    once = measure(model, given, torch.float32)
    twice = measure(model, given | {"code": given["code"] * 2}, torch.float32)
    for name in SUMS:
        found, expected = once.get("1", name, {"code": 2.0}), twice.get("1", name)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    none = dict.fromkeys(given, 0.0) | {"code": 1.0}
    assert np.array_equal(once.get("1", "tokens", none), once.sums["code", "1", "tokens"].sum(0))
    with pytest.raises(CoterieError, match="domain 'poetry' is not in the statistics; they hold prose, code, a/b"):
        once.get("1", "tokens", {"poetry": 2.0})
    with pytest.raises(CoterieError, match="layer 9 has no 'tokens'"):
        once.get("9", "tokens")


def test_statistics_of_another_model_are_refused(tiny_checkpoint):
    """By fingerprint, when used and when merged."""
    mine, theirs = (measure(Model.open(tiny_checkpoint(t)), sequences(), torch.float32) for t in ("mixtral", "olmoe"))
    with pytest.raises(CoterieError, match=r"x\.stats: collected on another model"):
        theirs.check_model(Checkpoint.open(tiny_checkpoint("mixtral")).hash, "x.stats")
    mine.check_model(Checkpoint.open(tiny_checkpoint("mixtral")).hash, "x.stats")
    with pytest.raises(CoterieError, match="collected on another model"):
        merge([mine, theirs])


def test_statistics_that_hold_different_sums_are_not_merged(tiny_checkpoint):
    """Logits of some of the tokens only would be wrong, not less."""
    whole = measure(Model.open(tiny_checkpoint("mixtral")), sequences(), torch.float32)
    part = Stats(whole.model, whole.samples, {k: v for k, v in whole.sums.items() if k[2] != "logits"})
    with pytest.raises(CoterieError, match="hold different sums"):
        merge([whole, part])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.pop("format"), "not a statistics file"),
        (lambda t, m: m.pop("samples"), "metadata is damaged"),
        (lambda t, m: m.update(samples="[1]"), "metadata is damaged"),
        (lambda t, m: m.update(samples="[" * 10**5), "metadata is damaged"),
        (lambda t, m: m.update(samples='{"x": 1e999}'), "metadata is damaged"),
        (lambda t, m: m.update(notes="1"), "metadata is damaged"),
        (lambda t, m: t.update({"x/1/kurtosis": np.ones((2, 8))}), "is not a statistic"),
        (lambda t, m: t.update({"tokens": np.ones((2, 8))}), "is not a statistic"),
        (lambda t, m: t.update({"x/1/tokens": np.ones(8)}), "is not a statistic"),
        (lambda t, m: t.update({"x/1/tokens": np.ones((3, 8))}), "is not a statistic"),
        (lambda t, m: t.update({"x/1/tokens": np.ones((2, 8), np.float32)}), "is not a statistic"),
        (lambda t, m: t.update({"x/1/tokens": np.full((2, 8), np.nan)}), "NaN or infinite"),
        (lambda t, m: t.update({"x/1/tokens": np.full((2, 8), -3.0)}), "negative values"),
        (lambda t, m: m.update(samples='{"x": 1, "y": 1}'), "domain 'y' has no '1/tokens', which others have"),
    ],
)
def test_other_files_are_refused(tmp_path, change, message):
    """Whatever a file holds that is no statistic."""
    from safetensors.numpy import save_file

    tensors, metadata = (
        {"x/1/tokens": np.ones((2, 8))},
        {"format": stats_module.FORMAT, "model": "m", "samples": '{"x": 1}'},
    )
    path = tmp_path / "x.stats"
    save_file(tensors, path, metadata=metadata)
    assert Stats.load(path).get("1", "tokens").tolist() == [2.0] * 8
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CoterieError, match=message):
        Stats.load(path)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_activations_that_are_no_numbers_are_refused(tiny_checkpoint, tmp_path, value):
    """A damaged weight is found in the layer where it acts; nothing is written."""
    tensors, config = tiny.read(tiny_checkpoint("qwen2_moe"))
    for e in range(tiny.NUM_EXPERTS):
        tensors[f"model.layers.2.mlp.experts.{e}.down_proj.weight"][0, 0] = value
    folder, out = tiny.write(tmp_path / "m", tensors, config), tmp_path / "x.stats"
    with pytest.raises(CoterieError, match="layer 2: output_norms are NaN or infinite"):
        collect(folder, out, data=files(tmp_path / "data", sequences()))
    assert not list(tmp_path.glob("*.stats*"))


def test_damage_outside_the_experts_is_found_in_the_next_layer(tiny_checkpoint, tmp_path):
    """NaN in a layer's attention reaches its own experts' inputs."""
    tensors, config = tiny.read(tiny_checkpoint("qwen2_moe"))
    tensors["model.layers.1.self_attn.o_proj.weight"][:] = np.nan
    folder = tiny.write(tmp_path / "m", tensors, config)
    with pytest.raises(CoterieError, match=r"layer 1: .* NaN or infinite"):
        collect(folder, tmp_path / "x.stats", data=files(tmp_path / "data", sequences()))


def test_bad_options_cost_nothing(tiny_checkpoint, tmp_path):
    """What is wrong is said before the model is read, and nothing is written."""
    folder, data = tiny_checkpoint("qwen2_moe"), files(tmp_path / "data", sequences())
    out = tmp_path / "x.stats"
    with pytest.raises(CoterieError, match="a folder; expected a new file's name"):
        collect(folder, tmp_path, data=data)
    with pytest.raises(CoterieError, match="its folder is missing"):
        collect(folder, tmp_path / "none" / "x.stats", data=data)
    for name in ("a\0b", "a" * 5000):
        with pytest.raises(CoterieError, match="not a file name"):
            collect(folder, name, data=data)
    with pytest.raises(CoterieError, match="--dtype 'int8': unknown; expected one of auto, float32, bfloat16, float16"):
        collect(folder, out, data=data, dtype="int8")
    with pytest.raises(CoterieError, match="--samples 2: expected a whole number, at least 3"):
        collect(folder, out, data=data, samples=2)
    with pytest.raises(CoterieError, match="pass each other more than hidden states"):
        collect(tiny_checkpoint("hy_v4"), out, data=data)
    out.write_text("mine")
    with pytest.raises(CoterieError, match="exists already"):
        collect(folder, out, data=data)
    assert out.read_text() == "mine"
    collect(folder, out, data=data, overwrite=True)
    assert Stats.load(out).layers == ["0", "1", "2", "3"]


def test_after_a_full_disk_the_same_command_goes_on(tiny_checkpoint, tmp_path, monkeypatch):
    """The file is absent or complete."""
    given = files(tmp_path / "data", sequences())

    def full(path, raw):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(CoterieError, match=r"cannot be written \(No space left on device\)"):
            collect(tiny_checkpoint("qwen2_moe"), tmp_path / "x.stats", data=given)
    assert [p.name for p in tmp_path.glob("*.stats*")] == ["x.stats.partial"]
    collect(tiny_checkpoint("qwen2_moe"), tmp_path / "x.stats", data=given, resume=True)
    assert [p.name for p in tmp_path.glob("*.stats*")] == ["x.stats"]


# --- what it is fed -----------------------------------------------------------------------------------------------


def test_the_tokenizer_is_loaded_for_text_only(tiny_checkpoint, tmp_path):
    """Tiny checkpoints have none: token ids do without, text is refused by the tokenizer's absence."""
    model = Model.open(tiny_checkpoint("qwen2_moe"))
    found, notes = read_samples(model, Calibration(data=files(tmp_path / "data", {"x": [(5, 6)]}), samples=1))
    assert (found, notes) == ({"x": [(5, 6)]}, ["documents read: x: 1 of input_ids"])
    (tmp_path / "data" / "readme.rst").write_text("some words")
    assert read_samples(model, Calibration(data={"x": tmp_path / "data"}, samples=1))[1] == [
        f"{tmp_path / 'data'}: files of other kinds are left out: 1 (.rst)",
        "documents read: x: 1 of input_ids",
    ]
    (tmp_path / "a.txt").write_text("some words")
    with pytest.raises(CoterieError, match="tokenizer"):
        read_samples(model, Calibration(data={"x": tmp_path / "a.txt"}))


class Spaces:
    """A tokenizer of any text: the length of each word."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens, verbose):
        assert add_special_tokens is False
        return {"input_ids": [len(word) for word in text.split()]}


def test_without_data_the_shipped_texts_are_used(tiny_checkpoint, monkeypatch):
    """One domain after the other, aloud."""
    monkeypatch.setattr(samples_module, "load_tokenizer", lambda path: Spaces())
    found, notes = read_samples(Model.open(tiny_checkpoint("qwen2_moe")), Calibration(samples=5, seq_len=16))
    assert list(found) == list(CALIBRATION) and all(len(s) == 1 for s in found.values())
    assert notes == [f"no --data: calibrating on the texts that ship with coterie ({', '.join(CALIBRATION)})"]


def test_lengths_are_clamped_to_the_config(tiny_checkpoint, tmp_path):
    """128 positions in the tiny configs; under another name in others."""
    model = Model.open(tiny_checkpoint("qwen2_moe"))
    with pytest.raises(CoterieError, match=r"0\.jsonl:1: 129 token ids; the model has 128 positions"):
        read_samples(model, Calibration(data=files(tmp_path / "data", {"x": [(5,) * 129]}), samples=1))
    assert max_positions({"max_seq_len": 7}) == 7
    assert max_positions({"text_config": {"max_position_embeddings": 9}}) == 9
    assert max_positions({"max_position_embeddings": None}) is None


def test_the_dtype_is_that_of_the_experts(tiny_checkpoint, tmp_path, monkeypatch):
    """Where they are quantised, the config's, else bfloat16; of a processor that computes in all of them."""
    from safetensors.torch import save_file

    monkeypatch.setattr("coterie.model.arithmetic._computes", lambda name: True)
    source = tiny_checkpoint("qwen2_moe")
    tensors, config = tiny.read(source)
    assert compute_dtype(Model.open(source)) == torch.float32
    assert compute_dtype(Model.open(source), "float16") == torch.float16
    folder = tmp_path / "m"
    shutil.copytree(source, folder)
    cases = [(torch.bfloat16, "float32", torch.bfloat16), (torch.float16, None, torch.float16)]
    for stored, said, expected in [
        *cases,
        (torch.float8_e4m3fn, "float16", torch.float16),
        (torch.float8_e4m3fn, None, torch.bfloat16),
    ]:
        config = {k: v for k, v in config.items() if "dtype" not in k} | ({"dtype": said} if said else {})
        (folder / "config.json").write_text(json.dumps(config))
        save_file({n: torch.from_numpy(v).to(stored) for n, v in tensors.items()}, folder / "model.safetensors")
        assert compute_dtype(Model.open(folder)) == expected


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_next"])  # the latter says which kernels are missing
def test_nothing_is_printed(tiny_checkpoint, tmp_path, model_type):
    """Not by transformers either: no bars, no warnings."""
    data = files(tmp_path / "data", {"x": [(5, 6)]})
    code = (
        "import sys; from coterie.verbs.collect import collect; "
        "collect(sys.argv[1], sys.argv[2], data=[f'x={sys.argv[3]}'], samples=1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tiny_checkpoint(model_type), tmp_path / "x.stats", data["x"]],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- blocks that transformers keeps closed ------------------------------------------------------------------------


def closed_calls(model, model_type, sample):
    """By layer and expert: (what it saw (T, D), the router's weights (T,)) of a sample, from stock's own modules."""
    found, handles = {}, []

    def dbrx(layer):
        def hook(_, args):
            x, chosen, weights = args[0].reshape(-1, args[0].shape[-1]), args[1], args[2]
            for e in range(8):
                rows, slots = (chosen == e).nonzero(as_tuple=True)
                found[layer, e] = (x[rows], weights[rows, slots])

        return hook

    def llama4(layer):
        def hook(_, args, output):
            rows = output[0].T  # scores (E, T), 0 where an expert was not chosen
            found.update({(layer, e): (args[0][rows[e] > 0] * rows[e][rows[e] > 0, None], rows[e][rows[e] > 0])
                          for e in range(8)})  # fmt: skip

        return hook

    def jetmoe(layer):
        def hook(_, args, output):
            ends = np.cumsum(output[3])
            for e, size in enumerate(output[3]):
                here = slice(ends[e] - size, ends[e])
                found[layer, e] = (args[0][output[1][here]], output[2][here])

        return hook

    decoder = model.model if hasattr(model, "model") else model.transformer
    for i, layer in enumerate(decoder.layers if hasattr(decoder, "layers") else decoder.blocks):
        if model_type == "dbrx":
            handles.append(layer.ffn.experts.register_forward_pre_hook(dbrx(str(i))))
        elif model_type == "llama4_text":
            handles.append(layer.feed_forward.router.register_forward_hook(llama4(str(i))))
        else:
            handles.append(layer.mlp.router.register_forward_hook(jetmoe(str(i))))
    with torch.inference_mode():
        model(input_ids=torch.tensor([sample]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("model_type", ["dbrx", "llama4_text", "jetmoe"])
def test_blocks_that_were_opened_are_measured_as_stock_computes_them(tiny_checkpoint, model_type):
    """Tokens, gates and inputs, by stock's own calls; llama4's experts see gate x token, and count once."""
    folder = tiny_checkpoint(model_type)
    sample = sequences()["prose"][1]
    stats = measure(Model.open(folder), {"a": [sample]}, torch.float32)
    model, faults = load_stock(folder, "float32")
    assert not faults
    calls = closed_calls(model, model_type, sample)
    assert {layer for layer, _ in calls} == set(stats.layers)
    for (layer, e), (x, gates) in calls.items():
        found = {n: stats.get(layer, n)[e] for n in ("tokens", "gates", "inputs_squared")}
        assert found["tokens"] == len(gates)
        np.testing.assert_allclose(found["gates"], gates.sum().item(), rtol=1e-5)
        np.testing.assert_allclose(found["inputs_squared"], x.double().square().sum(0).numpy(), rtol=1e-4, atol=1e-9)
        norms, gated = (stats.get(layer, n)[e] for n in ("output_norms", "gated_output_norms"))
        assert (gated == norms) == (model_type == "llama4_text" or norms == 0)
