"""The streaming forward: equal to the ordinary one for every family, with one layer and one expert in memory."""

import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import tiny
from coterie import calibrate, moe
from coterie.calibrate import Stream, plain_walk
from coterie.checkpoint import Checkpoint
from coterie.errors import CoterieError
from coterie.family import registry
from coterie.layer import Model
from coterie.loading import load_stock

STOCK = [t for t in tiny.model_types() if registry()[t].stock]
CLOSED = ["dbrx", "jetmoe", "llama4", "llama4_text"]  # their experts modules are not open to the registry
TALKATIVE = ["glm_moe_dsa", "hy_v4"]  # their layers pass each other the indices their attention chose
FOLLOWED = [t for t in STOCK if t not in CLOSED + TALKATIVE]
MULTIMODAL = ["aria", "gemma4", "qwen3_5_moe"]
# Rounding grows through their layers, in the ordinary forward as well (another batch, another rounding): in float64
# they agree like the others.
AMPLIFYING = {"gemma4", "gemma4_text", "qwen3_5_moe", "qwen3_5_moe_text"}

every_family = pytest.mark.parametrize("model_type", FOLLOWED)
LENGTHS = (24, 7, 24, 1, 13, 24)


def samples(lengths=LENGTHS, seed=1):
    draw = np.random.default_rng(seed)
    return [draw.integers(3, tiny.VOCABULARY, n).tolist() for n in lengths]


def streamed(stream, given, walk=None, tokens_per_batch=48):
    """Each sample's logits (T, vocabulary), in the order given."""
    batches = stream.embed(given, tokens_per_batch)
    for _ in stream.run(batches, walk or plain_walk(stream.checkpoint, stream.dtype)):
        pass
    found = {i: row for batch in batches for i, row in zip(batch.samples, stream.logits(batch), strict=True)}
    return [found[i] for i in range(len(given))]


def ordinary(folder, given, dtype):
    """The same by the stock model as a whole, one sample at a time."""
    model, faults = load_stock(folder, dtype, experts_implementation="eager")
    assert not faults
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([sample]), use_cache=False).logits[0] for sample in given]


def largest_difference(found, expected):
    """Over all samples, max |difference| as a share of the largest logit."""
    top = max(float(e.abs().max()) for e in expected)
    return max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True)) / top


def open_stream(folder, dtype=torch.float32):
    return Stream(Model.open(folder), dtype)


# --- equality -----------------------------------------------------------------------------------------------------


@every_family
def test_logits_equal_the_ordinary_forwards(tiny_checkpoint, model_type):
    """In float32 to 1e-5 of the largest logit; in float64, where only stock's own float32 islands round, to 1e-6."""
    folder, given = tiny_checkpoint(model_type), samples()
    for name, tolerance in (("float32", 1e-4 if model_type in AMPLIFYING else 1e-5), ("float64", 1e-6)):
        found = streamed(open_stream(folder, getattr(torch, name)), given)
        assert [len(f) for f in found] == list(LENGTHS)
        assert largest_difference(found, ordinary(folder, given, name)) <= tolerance


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3", "granitemoe"])
def test_the_spelling_on_disk_does_not_matter(tiny_checkpoint, model_type):
    """Fused and numbered experts give the same logits, bit for bit."""
    given = samples()
    a, b = (streamed(open_stream(tiny_checkpoint(model_type, fused)), given) for fused in (False, True))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@every_family
def test_a_filled_layer_is_stocks(tiny_checkpoint, model_type):
    """In bfloat16, where some parameters and buffers stay float32: values and dtypes are those of the whole model."""
    folder = tiny_checkpoint(model_type)
    stream = open_stream(folder, torch.bfloat16)
    whole, _ = load_stock(folder, "bfloat16")
    stream._load(None)
    for index, layer in enumerate(stream.layers):
        stream._load(index)
        expected = calibrate.decoder_layers(whole.get_decoder(), "")[index]
        wanted = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}
        found = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            assert tensor.dtype == wanted[name].dtype, name
            assert tensor.is_meta or torch.equal(tensor, wanted[name]), name


def test_batches_do_not_change_the_result(tiny_checkpoint):
    """One sample at a time or many of one length together: equal to rounding."""
    stream, given = open_stream(tiny_checkpoint("qwen2_moe")), samples((5, 5, 5, 9))
    alone = streamed(stream, given, tokens_per_batch=1)
    assert largest_difference(streamed(stream, given, tokens_per_batch=10), alone) <= 1e-6


def test_samples_of_equal_length_share_batches(tiny_checkpoint):
    """Of 24, 7, 24, 1, 13, 24 tokens at 48 a batch: the first two of 24 together; nothing is padded."""
    batches = open_stream(tiny_checkpoint("qwen2_moe")).embed(samples(), tokens_per_batch=48)
    assert [b.samples for b in batches] == [(0, 2), (5,), (1,), (3,), (4,)]
    assert [tuple(b.hidden.shape) for b in batches] == [(len(b.samples), LENGTHS[b.samples[0]], 32) for b in batches]


def test_a_stream_runs_again(tiny_checkpoint):
    """A second run, as after measuring, gives the same; what a layer computes for itself survives being emptied."""
    for model_type in ("minimax", "gpt_oss"):  # decay rates and rotary frequencies are buffers that no file holds
        stream = open_stream(tiny_checkpoint(model_type))
        a, b = (streamed(stream, samples()) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss", "lfm2_moe", "qwen3_5_moe"])
def test_one_layer_is_real_at_a_time_and_no_expert(tiny_checkpoint, model_type):
    """While a layer's experts are walked, only that layer's parameters are filled, and no expert's, ever."""
    stream = open_stream(tiny_checkpoint(model_type))
    walked, plain = [], plain_walk(stream.checkpoint, stream.dtype)

    def real(layers):
        return [i for i, layer in enumerate(layers) if not all(p.is_meta for p in layer.parameters())]

    def walk(routed):
        walked.append(int(routed.block.key))
        assert real(stream.layers) == [walked[-1]]
        assert all(p.is_meta for layer in stream.layers for m in moe.experts_modules(layer) for p in m.parameters())
        return plain(routed)

    batches = stream.embed(samples())
    assert real(stream.layers) == []
    for _ in stream.run(batches, walk):
        assert real(stream.layers) == []
    assert walked == [int(b.key) for b in stream.source.moe]
    if model_type == "qwen3_5_moe":  # the vision tower is not read for text
        assert all(p.is_meta for n, p in stream.model.named_parameters() if "visual" in n)


@pytest.mark.parametrize(("model_type", "fused"), [("mixtral", False), ("mixtral", True), ("gpt_oss", False)])
def test_each_expert_is_read_once(tiny_checkpoint, monkeypatch, model_type, fused):
    """Whatever the number of batches, no byte of an expert is read twice, and only of experts with tokens."""
    stream = open_stream(tiny_checkpoint(model_type, fused))
    ranges, raw = Counter(), Checkpoint.raw

    def counted(self, name, start=0, length=None):
        if stream.source.roles[name] == "expert":
            ranges[name, start, length] += 1
        return raw(self, name, start, length)

    monkeypatch.setattr(Checkpoint, "raw", counted)
    streamed(stream, samples(), tokens_per_batch=1)
    assert ranges and set(ranges.values()) == {1}


def test_experts_without_tokens_are_not_read(tiny_checkpoint, monkeypatch):
    """One token visits two experts of each layer."""
    stream, read = open_stream(tiny_checkpoint("mixtral")), []
    expert = moe.read_expert
    monkeypatch.setattr(
        moe, "read_expert", lambda c, block, e, dtype: read.append(block.key) or expert(c, block, e, dtype)
    )
    streamed(stream, samples((1,)))
    assert Counter(read) == {b.key: tiny.TOP_K for b in stream.source.moe}


def test_what_the_experts_are_asked(tiny_checkpoint):
    """Inputs, ids and weights of all batches, one row a token; `by_expert` lists each choice once, ascending."""
    stream, seen = open_stream(tiny_checkpoint("qwen2_moe")), []
    plain = plain_walk(stream.checkpoint, stream.dtype)
    streamed(stream, samples(), lambda routed: seen.append(routed) or plain(routed))
    for routed in seen:
        assert routed.x.shape == (sum(LENGTHS), tiny.HIDDEN)
        assert routed.chosen.shape == routed.weights.shape == (sum(LENGTHS), tiny.TOP_K)
        listed = {(e, int(r)): float(w) for e, rows, ws in routed.by_expert() for r, w in zip(rows, ws, strict=True)}
        pairs = zip(routed.chosen.tolist(), routed.weights.tolist(), strict=True)
        assert listed == {(e, r): w for r, (es, ws) in enumerate(pairs) for e, w in zip(es, ws, strict=True)}
        assert [e for e, _, _ in routed.by_expert()] == sorted(set(routed.chosen.flatten().tolist()))


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", CLOSED)
def test_closed_experts_are_refused(tiny_checkpoint, model_type):
    """Before anything is read, naming the layer."""
    with pytest.raises(CoterieError, match=r"layer 0: .* not open to transformers' registry.* needs no data"):
        open_stream(tiny_checkpoint(model_type))


@pytest.mark.parametrize("model_type", TALKATIVE)
def test_layers_that_pass_more_than_hidden_states_are_refused(tiny_checkpoint, model_type):
    """Before the first layer runs, naming the decoder."""
    stream = open_stream(tiny_checkpoint(model_type))
    with pytest.raises(
        CoterieError, match=r"layers of \w+Model pass each other more than hidden states.*needs no data"
    ):
        stream.embed(samples())


@pytest.mark.parametrize("model_type", [t for t in tiny.model_types() if not registry()[t].stock])
def test_families_that_transformers_does_not_build_are_refused(tiny_checkpoint, model_type):
    """A family without a stock class has no layers to run; its own code is never run."""
    with pytest.raises(CoterieError, match=r"transformers does not build it .*needs no data"):
        open_stream(tiny_checkpoint(model_type))


def test_a_layer_that_returns_two_values_is_refused(tiny_checkpoint):
    """Its second value would be lost; a tuple of one is the hidden states."""
    stream = open_stream(tiny_checkpoint("qwen2_moe"))
    batches = stream.embed(samples())
    stream.layers[1].forward = lambda hidden, *args, **kwargs: (hidden, hidden)
    with pytest.raises(CoterieError, match=r"more than hidden states \(layer 1 returns 2 values\)"):
        list(stream.run(batches, plain_walk(stream.checkpoint, stream.dtype)))
    stream.layers[1].forward = lambda hidden, *args, **kwargs: (hidden,)
    assert list(stream.run(batches, plain_walk(stream.checkpoint, stream.dtype))) == [0, 1, 2, 3]


def test_arguments_that_depend_on_layers_before_are_refused(tiny_checkpoint, monkeypatch):
    """What a decoder computes from one layer's output for the next cannot be recorded beforehand."""
    stream = open_stream(tiny_checkpoint("qwen2_moe"))

    def forward(input_ids, use_cache):
        hidden = stream.decoder.embed_tokens(input_ids)
        for layer in stream.layers:
            hidden = layer(hidden, bias=hidden.mean())

    monkeypatch.setattr(stream.decoder, "forward", forward)
    with pytest.raises(CoterieError, match="arguments depend on the layers before"):
        stream.embed(samples())


@pytest.mark.parametrize(
    ("between", "reason"), [(lambda h: h * 2, "something happens between"), (lambda h: h[0], "something happens")]
)
def test_work_between_layers_is_refused(tiny_checkpoint, monkeypatch, between, reason):
    """As is a decoder that takes a layer's output apart, or runs some layers only."""
    stream = open_stream(tiny_checkpoint("qwen2_moe"))

    def forward(input_ids, use_cache):
        hidden = stream.decoder.embed_tokens(input_ids)
        for layer in stream.layers:
            hidden = between(layer(hidden))

    monkeypatch.setattr(stream.decoder, "forward", forward)
    with pytest.raises(CoterieError, match=reason):
        stream.embed(samples())
    monkeypatch.setattr(stream.decoder, "forward", lambda input_ids, use_cache: stream.layers[0](input_ids))
    with pytest.raises(CoterieError, match="1 calls of 4 layers"):
        stream.embed(samples())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[5], [5, 128]], "sample 1: token id 128; expected one id or more, all below 128"),
        ([[-1]], "token id -1"),
        ([[]], "sample 0: no tokens"),
    ],
)
def test_impossible_tokens_are_refused(tiny_checkpoint, given, message):
    """Ids beyond the vocabulary, negative ones, and empty samples."""
    with pytest.raises(CoterieError, match=message):
        open_stream(tiny_checkpoint("qwen2_moe")).embed(given)


def without(folder, source, pattern):
    """A copy of a checkpoint that lacks the tensors whose names match."""
    tensors, config = tiny.read(source)
    return tiny.write(folder, {n: v for n, v in tensors.items() if not re.search(pattern, n)}, config)


@pytest.mark.parametrize("missing", [r"input_layernorm", r"embed_tokens", r"model\.norm\."])
def test_a_missing_tensor_is_refused(tiny_checkpoint, tmp_path, missing):
    """What no tensor fills is named, in a layer or outside; nothing is made up."""
    stream = open_stream(without(tmp_path / "m", tiny_checkpoint("qwen2_moe"), missing))
    with pytest.raises(CoterieError, match=f"no tensor fills '.*{missing}.*'"):
        streamed(stream, samples())


def test_an_unknown_tensor_in_a_layer_is_refused(tiny_checkpoint, tmp_path):
    """A tensor that the model has no place for is named, not skipped."""
    tensors, config = tiny.read(tiny_checkpoint("qwen2_moe"))
    tensors["model.layers.1.self_attn.extra.weight"] = np.ones(3, np.float32)
    with pytest.raises(CoterieError, match=r"transformers does not take .*layers\.1\.self_attn\.extra"):
        streamed(open_stream(tiny.write(tmp_path / "m", tensors, config)), samples())


def test_quantised_weights_outside_the_experts_are_refused(tiny_checkpoint, tmp_path):
    """FP8 attention weights need scales, which only experts' weights get."""
    tensors, _ = tiny.read(tiny_checkpoint("qwen2_moe"))
    folder = tmp_path / "m"
    shutil.copytree(tiny_checkpoint("qwen2_moe"), folder)
    changed = {n: torch.from_numpy(v) for n, v in tensors.items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(changed | {name: changed[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    with pytest.raises(CoterieError, match=rf"{re.escape(name)}' is F8_E4M3, quantised outside the experts"):
        streamed(open_stream(folder), samples())


def test_experts_where_the_config_has_none_are_refused(tiny_checkpoint, tmp_path):
    """A config that makes a layer dense contradicts the experts on disk."""
    tensors, config = tiny.read(tiny_checkpoint("qwen2_moe"))
    folder = tiny.write(tmp_path / "m", tensors, config | {"mlp_only_layers": [2]})
    with pytest.raises(CoterieError, match="layer 2"):
        open_stream(folder)


# --- suspended forwards -------------------------------------------------------------------------------------------


def test_errors_inside_a_suspended_forward_come_out_as_they_are(tiny_checkpoint):
    """Of the layer's own code as of the walk's, with every other batch still waiting."""
    stream = open_stream(tiny_checkpoint("qwen2_moe"))
    batches = stream.embed(samples())

    class Fault(Exception):
        pass

    def walk(routed):
        raise Fault("in the walk")

    with pytest.raises(Fault, match="in the walk"):
        next(stream.run(batches, walk))
    forward, calls = stream.layers[0].mlp.forward, []

    def fail_in_the_third_batch(hidden):
        calls.append(hidden)
        if len(calls) == 3:
            raise Fault("in the layer")
        return forward(hidden)

    stream.layers[0].mlp.forward = fail_in_the_third_batch
    with pytest.raises(Fault, match="in the layer"):
        next(stream.run(batches, plain_walk(stream.checkpoint, stream.dtype)))
    stream.layers[0].mlp.forward = forward
    assert next(stream.run(batches, plain_walk(stream.checkpoint, stream.dtype))) == 0


def test_errors_after_the_walk_come_out_too(tiny_checkpoint):
    """A walk that returns another number of rows is a defect that shows at once."""
    stream = open_stream(tiny_checkpoint("qwen2_moe"))
    with pytest.raises(RuntimeError):
        next(stream.run(stream.embed(samples()), lambda routed: routed.x[:-1]))


def test_the_implementation_runs_nowhere_else(tiny_checkpoint):
    """A model that is told to use it outside a stream is refused, within another program's greenlet as well."""
    from greenlet import greenlet

    open_stream(tiny_checkpoint("qwen2_moe"))
    model, _ = load_stock(tiny_checkpoint("qwen2_moe"), "float32", experts_implementation=moe.IMPLEMENTATION)
    assert moe.IMPLEMENTATION in ALL_EXPERTS_FUNCTIONS

    def call():
        model(input_ids=torch.tensor([[5, 6]]))

    for run in (call, greenlet(call).switch):
        with pytest.raises(CoterieError, match="only inside a streaming forward"):
            run()


def test_gradients_are_off(tiny_checkpoint):
    """No graph is kept, though the caller says nothing."""
    stream = open_stream(tiny_checkpoint("qwen2_moe"))
    assert torch.is_grad_enabled()
    assert not any(logits.requires_grad for logits in streamed(stream, samples()))
    assert torch.is_grad_enabled()
