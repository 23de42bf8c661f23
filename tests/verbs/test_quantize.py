"""Experts in few bits end to end on tiny models: bytes, config, what reads them, verify, resume, refusals."""

import json

import numpy as np
import pytest

import coterie
import tiny
from coterie.errors import CoterieError
from coterie.methods.levels import Levels
from coterie.methods.quantize import round as rounding
from coterie.model.experts import expert_storage
from coterie.model.layer import Model
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.apply import apply
from coterie.verbs.collect import collect
from coterie.verbs.prune import prune
from coterie.verbs.quantize import quantize
from coterie.verbs.verify import verify

WIDE = {"hidden_size": 64, "moe_intermediate_size": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random qwen3_moe whose rows divide into groups of 32, in float32."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    import tiny

    folder = tmp_path_factory.mktemp("wide") / "source"
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**tiny.SIZES | WIDE | {"num_hidden_layers": 2, "mlp_only_layers": []})
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.id_lines(tmp_path_factory.mktemp("data") / "ids.jsonl", 8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_is_stored_is_what_rounding_gives(source, tmp_path, bits):
    """Every expert reads back as its rule's values; everything else keeps its bytes; sizes are as the formula says."""
    report = quantize(source, tmp_path / "out", bits=bits, method="round").report
    before, after = Model.open(source), Model.open(tmp_path / "out")
    stored = 0
    for block, low in zip(before.main, after.main, strict=True):
        for e in range(block.num_experts):
            pairs = zip(
                expert_storage(before.checkpoint, block, e), expert_storage(after.checkpoint, low, e), strict=True
            )
            for matrix, found in pairs:
                expected = rounding.quantise(matrix.rows(0), Levels(bits, 32, "F32")).values
                assert np.array_equal(found.rows(0), expected), found.name
                rows, columns = matrix.shape
                stored += rows * columns * bits // 8 + rows * columns // 32 * 4 + 16
    others = [name for name, role in before.roles.items() if role != "expert"]
    assert all(after.checkpoint.raw(name) == before.checkpoint.raw(name) for name in others)
    assert report["after"]["bytes"] == stored + sum(before.checkpoint.tensors[name].num_bytes for name in others)
    assert report["after"]["parameters"] == report["before"]["parameters"] and report["sparsity"]["all"] == 0


def test_the_config_is_the_one_that_engines_look_for(source, tmp_path):
    quantize(source, tmp_path / "out", bits=4)
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    group = found["config_groups"]["experts"]
    assert (found["quant_method"], found["format"]) == ("compressed-tensors", "pack-quantized")
    assert group["targets"] == [r"re:.*\.experts\.\d+\.(down_proj|gate_proj|up_proj)$"]
    assert group["weights"]["num_bits"] == 4 and group["weights"]["group_size"] == 32
    record = json.loads((tmp_path / "out" / "coterie.json").read_text())
    assert record["plan"]["layers"] == {"0": {"bits": 4}, "1": {"bits": 4}}
    assert record["plan"]["quantized"] == {
        "format": "compressed-tensors", "group_size": 32, "method": "search", "from_data": False,
    }  # fmt: skip
    assert record["report"]["bits"]["experts"] == 4.5 and "transformers" in record["report"]["loads_in"]


def test_transformers_takes_it_and_computes_with_what_is_stored(source, tmp_path):
    """By its own loading with the compressed-tensors package: no key missing or unexpected, and the experts' values."""
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    quantize(source, tmp_path / "out", bits=4)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    found = Model.open(tmp_path / "out")
    for block in found.main:
        experts = model.model.layers[int(block.key)].mlp.experts
        for e in range(block.num_experts):
            up, down, gate = (matrix.rows(0) for matrix in expert_storage(found.checkpoint, block, e))
            assert np.array_equal(experts.gate_up_proj[e].float().detach().numpy(), np.concatenate([gate, up]))
            assert np.array_equal(experts.down_proj[e].float().detach().numpy(), down)


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_data_make_it_better_and_a_killed_run_resumes(source, tmp_path, data, method):
    """The same bytes whether it was interrupted or not; verify finds them as recorded."""
    quantize(source, tmp_path / "whole", bits=3, method=method, data=data, samples=8, seq_len=64)

    def stop(stage, done, total):
        if (stage, done) == ("quantising layers", 1):
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, bits=3, method=method, data=data, samples=8, seq_len=64, on_progress=stop)
    quantize(source, out, bits=3, method=method, data=data, samples=8, seq_len=64, resume=True)
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    found = verify(out, against=source)
    assert found["ok"], found


@pytest.mark.parametrize("method", ["round", "gptq"])
@pytest.mark.parametrize("part", ["weight_packed", "weight_scale"])
def test_verify_finds_one_flipped_bit(source, tmp_path, data, method, part):
    out = tmp_path / "out"
    given = {"data": data, "samples": 8, "seq_len": 64} if method == "gptq" else {}
    quantize(source, out, bits=2, method=method, **given)
    assert verify(out, against=source)["ok"]
    tensor = Checkpoint.open(out).tensors[f"model.layers.1.mlp.experts.3.up_proj.{part}"]
    raw = bytearray((out / tensor.file).read_bytes())
    raw[tensor.start + 1] ^= 1
    (out / tensor.file).write_bytes(raw)
    assert not verify(out, against=source)["ok"]


def test_other_commands_read_the_result(source, tmp_path, data):
    """It is a model like any other: measured, and cut by moving bytes."""
    quantize(source, tmp_path / "low", bits=4)
    collect(tmp_path / "low", tmp_path / "stats", data=data, samples=4, seq_len=64)
    prune(tmp_path / "low", tmp_path / "few", ratio=0.5)
    low, few = Model.open(tmp_path / "low"), Model.open(tmp_path / "few")
    kept = json.loads((tmp_path / "few" / "coterie.json").read_text())["plan"]["layers"]["0"]["kept"]
    for new, old in enumerate(kept):
        for name, was in few.main[0].experts[new].items():
            assert few.checkpoint.raw(was) == low.checkpoint.raw(low.main[0].experts[old][name])


def test_a_plan_without_data_can_be_applied_and_one_with_data_cannot(source, tmp_path, data):
    quantize(source, tmp_path / "out", bits=4)
    apply(source, tmp_path / "out" / "coterie.json", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    quantize(source, tmp_path / "with", bits=4, data=data, samples=8, seq_len=64)
    with pytest.raises(CoterieError, match="made from data, which no plan holds"):
        apply(source, tmp_path / "with" / "coterie.json", tmp_path / "not")


def test_experts_that_no_token_reaches_are_listed(source, tmp_path, data):
    """One sequence of four tokens reaches at most eight of the sixteen experts of two layers."""
    path = tmp_path / "few.jsonl"
    path.write_text(json.dumps({"input_ids": [3, 3, 3, 3]}) + "\n")
    report = quantize(source, tmp_path / "out", bits=4, data={"a": path}, samples=1, seq_len=4).report
    assert len(report["cold_experts"]) >= 8 and all(tokens == 0 for _, _, tokens in report["cold_experts"])
    assert verify(tmp_path / "out", against=source)["ok"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 5}, "--bits 5: expected one of 2, 3, 4, 8"),
        ({"group_size": 48}, "--group-size 48: expected one of 128, 64, 32"),
        ({"group_size": 128}, "rows of 64 weights, which groups of 128 do not divide"),
        ({"method": "awq"}, "--method 'awq': unknown"),
        ({"method": "round", "data": True}, "--data would be ignored: round needs none"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(source, tmp_path, data, given, message):
    given = {key: data if value is True else value for key, value in given.items()}
    with pytest.raises(CoterieError, match=message):
        quantize(source, tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []


def test_models_that_the_format_cannot_hold_are_refused(source, tmp_path, tiny_checkpoint):
    """Rows that no group divides, experts in one tensor, and what is quantised already."""
    quantize(source, tmp_path / "low", bits=4)
    for model, message in (
        (tiny_checkpoint("qwen3_moe"), "no group of 128, 64, 32 divides them all"),
        (tiny_checkpoint("gpt_oss"), "no group of|keeps all experts in one tensor, or in lists"),
        (tmp_path / "low", "is quantised already"),
    ):
        with pytest.raises(CoterieError, match=message):
            quantize(model, tmp_path / "out")


@pytest.mark.parametrize("method", ["round", "gptq"])
def test_weights_that_are_not_numbers_are_named(source, tmp_path, data, method):
    """NaN in one expert: no result, and the tensor's name."""
    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.experts.2.down_proj.weight"][1, 1] = np.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (broken / "config.json").write_bytes((source / "config.json").read_bytes())
    given = {"data": data, "samples": 8, "seq_len": 64} if method == "gptq" else {}
    named = r"layers\.0\.mlp\.experts\.2\.down_proj|layer 0, expert 2|layer 0: hidden states"
    with pytest.raises(CoterieError, match=named):
        quantize(broken, tmp_path / "out", method=method, **given)
    assert not (tmp_path / "out").exists()


def test_experts_in_lists_are_refused_whatever_the_plan_says(tiny_checkpoint, tmp_path):
    """gpt-oss with one linear for every expert: no target of the format would match its names."""
    tensors, config = tiny.read(tiny_checkpoint("gpt_oss"))
    listed = tiny.write(tmp_path / "lists", tiny.as_lists(tensors), config)
    scheme = {"format": "compressed-tensors", "group_size": 32, "method": "round"}
    plan = {"layers": {block.key: {"bits": 4} for block in Model.open(listed).moe}, "quantized": scheme}
    with pytest.raises(CoterieError, match="keeps all experts in one tensor, or in lists"):
        apply(listed, plan, tmp_path / "out")


# --- widths of their own -------------------------------------------------------------------------------------------


def widths_of(report):
    return [b for layer in report.plan["layers"].values() for b in layer["bits"]]


@pytest.mark.parametrize("method", ["round", "search", "gptq"])
def test_experts_of_mixed_widths_are_what_their_rule_gives(source, data, tmp_path, method):
    """The mean is met, none above; what is stored is each expert at its own width, and nothing at 0 bits; it is
    verified against the original, loads, and computes what the decoded experts do."""
    report = quantize(source, tmp_path / "out", average=2.5, method=method, data=data, samples=8)
    widths = widths_of(report)
    assert sum(widths) <= 2.5 * len(widths) and len(set(widths)) > 1
    assert report.plan["quantized"]["format"] == "coterie" and report.report["loads_in"] == ["coterie"]
    low, original = Model.open(tmp_path / "out"), Model.open(source)
    for block, before in zip(low.main, original.main, strict=True):
        for e, bits in enumerate(report.plan["layers"][block.key]["bits"]):
            pairs = zip(
                expert_storage(low.checkpoint, block, e), expert_storage(original.checkpoint, before, e), strict=True
            )
            for found, matrix in pairs:
                if not bits:
                    assert not found.rows(0).any()
                elif method == "round":
                    assert np.array_equal(
                        found.rows(0), rounding.quantise(matrix.rows(0), Levels(bits, 32, "F32")).values
                    )
    assert verify(tmp_path / "out", against=source)["ok"]
    import torch

    model = coterie.load(tmp_path / "out")
    stats = tmp_path / "x.stats"
    collect(tmp_path / "out", stats, data=data, samples=4)
    with torch.inference_mode():
        assert torch.isfinite(model(torch.arange(3, 20)[None]).logits).all()


def test_a_damaged_code_is_found(source, data, tmp_path):
    """One bit of codes that data made: the checksum says so, with exit code 3's answer."""
    quantize(source, tmp_path / "out", average=3, method="gptq", data=data, samples=8)
    checkpoint = Checkpoint.open(tmp_path / "out")
    name = next(n for n in checkpoint.tensors if n.endswith(".codes") and checkpoint.tensors[n].num_bytes)
    tensor = checkpoint.tensors[name]
    path = tmp_path / "out" / tensor.file
    raw = bytearray(path.read_bytes())
    raw[tensor.start] ^= 1
    path.write_bytes(raw)
    found = verify(tmp_path / "out", against=source)
    assert not found["ok"] and any("checksum" in c["detail"] for c in found["checks"])


def test_widths_follow_what_was_measured(source, data, tmp_path):
    """The mean of measured widths costs less than that of random ones and of frequency, by the same measure."""
    costs = {
        by: quantize(
            source, tmp_path / by, average=2.5, method="search", data=data, samples=8, allocate=by, dry_run=True
        ).report["widths"]["cost"]
        for by in ("measured", "frequency", "random")
    }
    assert costs["measured"] == min(costs.values()) < min(costs["frequency"], costs["random"])


def test_a_layer_can_have_a_width(source, data, tmp_path):
    """Whole layers: one number each, none dropped; the plan can be applied where no data made it."""
    report = quantize(source, tmp_path / "out", average=3, per="layer", method="round", data=data, samples=8)
    found = {key: layer["bits"] for key, layer in report.plan["layers"].items()}
    assert set(found.values()) <= {2, 3, 4, 8} and sum(found.values()) <= 3 * len(found)
    apply(source, tmp_path / "out" / "coterie.json", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_one_width_can_be_stored_in_our_format(source, tmp_path):
    """The same values as in compressed-tensors' format."""
    for name, options in (("ours", {"format": "coterie"}), ("theirs", {})):
        quantize(source, tmp_path / name, bits=3, method="search", **options)
    ours, theirs = Model.open(tmp_path / "ours"), Model.open(tmp_path / "theirs")
    for one, other in zip(ours.main, theirs.main, strict=True):
        for e in range(one.num_experts):
            for a, b in zip(
                expert_storage(ours.checkpoint, one, e), expert_storage(theirs.checkpoint, other, e), strict=True
            ):
                assert np.array_equal(a.rows(0), b.rows(0))
    assert verify(tmp_path / "ours", against=source)["ok"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"average": 2.5, "bits": 3}, "exclude each other"),
        ({"average": 9}, "--average 9"),
        ({"average": 0}, "--average 0"),
        ({"average": 1.5, "per": "layer"}, "--average 1.5"),
        ({"average": 2.5, "format": "compressed-tensors"}, "knows one width"),
        ({"per": "layer"}, "add --average"),
        ({"allocate": "random"}, "add --average"),
        ({"average": 2.5, "per": "modle"}, "did you mean model|expected one of"),
        ({"format": "gguf"}, "expected one of"),
    ],
)
def test_mixed_widths_that_make_no_sense_are_refused(source, tmp_path, options, says):
    """Before anything is read of the data, and nothing is written."""
    with pytest.raises(CoterieError, match=says):
        quantize(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_expert_of_no_bits_reads_as_zeros(source, data, tmp_path):
    """`read_expert` gives what the codec decodes to."""
    report = quantize(source, tmp_path / "out", average=1, method="round", data=data, samples=8)
    layer, bits = next((k, v["bits"]) for k, v in report.plan["layers"].items() if 0 in v["bits"] and max(v["bits"]))
    for e in (bits.index(0), bits.index(max(bits))):
        matrices = coterie.read_expert(tmp_path / "out", layer, e)
        assert [m.shape for m in matrices] == [(32, 64), (32, 64), (64, 32)]
        assert all(m.any() == (bits[e] > 0) for m in matrices)


def test_a_killed_run_of_mixed_widths_goes_on(source, data, tmp_path):
    """To the same bytes, whatever layer it was stopped at."""
    asked = {"average": 2.5, "method": "gptq", "data": data, "samples": 8}
    quantize(source, tmp_path / "whole", **asked)

    def stop(stage, done, total):
        if stage == "quantising layers" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", on_progress=stop, **asked)
    quantize(source, tmp_path / "out", resume=True, **asked)
    whole, out = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert whole.read_bytes() == out.read_bytes()
