"""The streaming forward: equal to the ordinary one for every family, with one layer and one expert in memory."""

import json
import mmap
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import tiny
from coterie.errors import CoterieError
from coterie.forward import activations, skeleton
from coterie.forward.activations import plain_walk, restore, save
from coterie.forward.stream import Stream
from coterie.model import moe, opened
from coterie.model.families import UNABLE
from coterie.model.family import registry
from coterie.model.layer import Model
from coterie.model.loading import decoder_layers, load_stock
from coterie.storage import tensors
from coterie.storage.checkpoint import Checkpoint

STOCK = [t for t in tiny.model_types() if registry()[t].stock]
# transformers keeps their experts to itself.
OPENED = ["dbrx", "jetmoe", "llama4", "llama4_text", "longcat_flash", "step3p7"]
# Their layers pass each other the indices their attention chose, or attend to what the ones before put out.
TALKATIVE = ["glm5_next", "glm_moe_dsa", "hy_v4", "inkling2", "inkling2_text", "mistral_large4"]
FOLLOWED = [t for t in STOCK if t not in TALKATIVE]
MULTIMODAL = ["aria", "gemma4", "qwen3_5_moe"]
# Rounding grows through their layers, in the ordinary forward as well (another batch, another rounding): in float64
# they agree like the others.
AMPLIFYING = {"gemma4", "gemma4_text", "qwen3_5_moe", "qwen3_5_moe_text"}

MMAP = mmap.mmap
CHOICE = torch.zeros(24, 1, dtype=torch.long), torch.ones(24, 1)
every_family = pytest.mark.parametrize("model_type", FOLLOWED)
LENGTHS = (24, 7, 24, 1, 13, 24)


def samples(lengths=LENGTHS, seed=1):
    draw = np.random.default_rng(seed)
    return [draw.integers(3, tiny.VOCABULARY, n).tolist() for n in lengths]


def streamed(stream, given, walk=None, tokens_per_batch=48, rehearse=None, **activations):
    """Each sample's logits (T, vocabulary), in the order given."""
    batches = stream.embed(given, tokens_per_batch, **activations)
    for _ in stream.run(batches, walk or plain_walk(stream.checkpoint, stream.dtype), rehearse=rehearse):
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
    stream._skeleton.load_outside(head=True)
    for index, layer in enumerate(stream.layers):
        stream._skeleton.load(index)
        expected = decoder_layers(whole.get_decoder(), "")[index]
        wanted = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}
        found = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        others = {n for n in wanted.keys() - found.keys() if model_type in OPENED}  # the experts, replaced
        assert found.keys() == wanted.keys() - others and all(
            re.search("experts|(in|out)put_linear", n) for n in others
        )
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
    ranges, raw, read_into = Counter(), Checkpoint.raw, tensors.read_into

    def counted(self, name, start=0, length=None):
        if stream.source.roles[name] == "expert":
            ranges[name, start, length] += 1
        return raw(self, name, start, length)

    def counted_into(tensor, checkpoint, name, start=0):
        if stream.source.roles[name] == "expert":
            ranges[name, start, tensor.nbytes] += 1
        read_into(tensor, checkpoint, name, start)

    monkeypatch.setattr(Checkpoint, "raw", counted)
    for module in (tensors, moe):
        monkeypatch.setattr(module, "read_into", counted_into)
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


# --- activations that leave memory --------------------------------------------------------------------------------


@every_family
def test_spilled_activations_change_no_bit(tiny_checkpoint, tmp_path, model_type):
    """Mapped to files, layers run twice: the same logits, and nothing stays in the folder."""
    stream = open_stream(tiny_checkpoint(model_type))
    expected = streamed(stream, samples())
    found = streamed(stream, samples(), spill=tmp_path, budget=0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gemma4_text", "gpt_oss", "minimax", "deepseek_v4"])
def test_spilled_activations_change_no_bit_in_bfloat16(tiny_checkpoint, tmp_path, monkeypatch, model_type):
    """Nor where tables of embeddings are mapped, and rows move in small pieces."""
    stream = open_stream(tiny_checkpoint(model_type), torch.bfloat16)
    expected = streamed(stream, samples())
    monkeypatch.setattr(activations, "MOST_ROWS", 3)
    monkeypatch.setattr(skeleton, "MAPPED", 1)
    found = streamed(stream, samples(), spill=tmp_path, budget=0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_large_activations_spill_by_themselves(tiny_checkpoint):
    """Five times 93 tokens of 32 numbers of 4 bytes; a budget of as much keeps them in memory."""
    stream, size = open_stream(tiny_checkpoint("qwen2_moe")), 5 * sum(LENGTHS) * 32 * 4
    assert all(b.maps is None for b in stream.embed(samples(), budget=size))
    assert all(b.maps is not None for b in stream.embed(samples(), budget=size - 1))
    assert all(b.maps is None for b in stream.embed(samples(), budget=3 * size, copies=3))
    assert all(b.maps is not None for b in stream.embed(samples(), budget=3 * size - 1, copies=3))
    assert all(b.maps is None for b in stream.embed(samples()))


def test_hidden_states_of_another_type_move_to_another_map(tiny_checkpoint):
    """A layer that widens its output is not cut back."""
    batch, *_ = open_stream(tiny_checkpoint("qwen2_moe"), torch.bfloat16).embed(samples(), budget=0)
    assert batch.hidden.dtype == torch.bfloat16
    wide = torch.randn(batch.hidden.shape)
    batch.hidden = wide
    assert torch.equal(batch.hidden, wide)


@pytest.mark.parametrize("budget", [0, 2**30])
def test_saved_hidden_states_go_on(tiny_checkpoint, tmp_path, budget):
    """What is saved between two layers and restored into new batches ends the same; the file is safetensors."""
    stream = open_stream(tiny_checkpoint("gemma4_text"))
    walk = plain_walk(stream.checkpoint, stream.dtype)
    batches = stream.embed(samples(), 48, budget=budget)
    for index in stream.run(batches, walk):
        if index == 1:
            save(batches, tmp_path / "1.safetensors")
            assert all(torch.equal(v, batches[int(i)].hidden) for i, v in load_file(tmp_path / "1.safetensors").items())
    again = stream.embed(samples(), 48, budget=budget)
    restore(again, tmp_path / "1.safetensors")
    assert list(stream.run(again, walk, first=2)) == [2, 3]
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(batches, again, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["1.safetensors"]


@pytest.mark.parametrize("allocations", [0, 1, 2])
def test_a_full_disk_is_said_before_it_is_written_to(tiny_checkpoint, tmp_path, monkeypatch, allocations):
    """For the hidden states, the experts' inputs and their sums: room is taken first, for a full map kills."""
    stream, left = open_stream(tiny_checkpoint("qwen2_moe")), [allocations]

    def allocate(file, offset, size):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors.os, "posix_fallocate", allocate)
    monkeypatch.setattr(tensors.mmap, "mmap", lambda file, size: MMAP(-1, size))
    with pytest.raises(CoterieError, match=rf"{tmp_path}: cannot hold 0\.0 GB of activations \(No space.*fewer or"):
        streamed(stream, samples(), spill=tmp_path, budget=0)


def test_a_folder_that_is_not_there_is_refused(tiny_checkpoint, tmp_path):
    """Before the first layer."""
    with pytest.raises(CoterieError, match=r"nowhere: cannot hold .* \(No such file or directory\)"):
        open_stream(tiny_checkpoint("qwen2_moe")).embed(samples(), spill=tmp_path / "nowhere", budget=0)


def test_masks_and_rotations_are_held_once(tiny_checkpoint):
    """Batches of one shape have the same tensors beside their hidden states; per-token ones differ."""
    first, second, *_ = open_stream(tiny_checkpoint("gpt_oss")).embed(samples((24, 24, 24)), tokens_per_batch=24)
    pairs = zip(tree_leaves(first.arguments), tree_leaves(second.arguments), strict=True)
    assert all(a is b for a, b in pairs if isinstance(a, torch.Tensor))


def test_tables_are_let_go_once_read(tiny_checkpoint):
    """Embeddings and head are empty while layers run; the head is read for logits, tied to the embeddings or not."""
    for model_type in ("qwen2_moe", "cohere2_moe"):
        stream = open_stream(tiny_checkpoint(model_type))
        batches = stream.embed(samples())
        assert all(p.is_meta for p in stream.model.parameters())
        list(stream.run(batches, plain_walk(stream.checkpoint, stream.dtype)))
        assert all(p.is_meta for p in stream.model.parameters())
        stream.logits(batches[0])
        assert not stream.model.get_output_embeddings().weight.is_meta


@pytest.mark.slow
def test_memory_does_not_grow_with_the_samples(tmp_path):
    """65,536 tokens of 2 KB: of three maps of 134 MB less than half of one is resident at any time."""
    sizes = {"hidden_size": 512, "num_hidden_layers": 1, "vocab_size": 128}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **sizes, **experts)).save_pretrained(tmp_path)
    code = """
import resource, sys, torch
from pathlib import Path
from coterie.forward.activations import plain_walk
from coterie.forward.stream import Stream
from coterie.model.layer import Model

stream = Stream(Model.open(sys.argv[1]), torch.float32)

def run(num_samples):
    batches = stream.embed(torch.randint(3, 128, (num_samples, 64)).tolist(), spill=Path(sys.argv[1]), budget=2**20)
    list(stream.run(batches, plain_walk(stream.checkpoint, stream.dtype)))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = run(64)
print(run(1024) - before)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 64e6


# --- rehearsals ---------------------------------------------------------------------------------------------------

both_ways = pytest.mark.parametrize("budget", [2**30, 0], ids=["in memory", "spilled"])


@both_ways
def test_a_rehearsal_leaves_nothing_behind(tiny_checkpoint, budget):
    """Called with each layer filled before it runs; however often it goes forward, the result is the same."""
    stream, seen = open_stream(tiny_checkpoint("deepseek_v3")), []
    plain = plain_walk(stream.checkpoint, stream.dtype)

    def rehearse(index, layer, forward):
        assert layer is stream.layers[index] and not layer.input_layernorm.weight.is_meta
        seen.append(index)
        forward(plain)
        forward(lambda routed: routed.zeros())

    found = streamed(stream, samples(), rehearse=rehearse, budget=budget)
    assert seen == [0, 1, 2, 3]
    assert all(torch.equal(a, b) for a, b in zip(found, streamed(stream, samples()), strict=True))


@both_ways
def test_parameters_changed_in_a_rehearsal_compute(tiny_checkpoint, tmp_path, budget):
    """As if the checkpoint had held them so, in the next rehearsed forward too."""
    values, config = tiny.read(tiny_checkpoint("qwen2_moe"))
    name = "model.layers.2.self_attn.o_proj.weight"
    values[name][:, ::2] = 0
    expected = streamed(open_stream(tiny.write(tmp_path / "m", values, config)), samples())
    stream, outputs = open_stream(tiny_checkpoint("qwen2_moe")), []
    plain = plain_walk(stream.checkpoint, stream.dtype)

    def rehearse(index, layer, forward):
        parameters = {stored: dict(layer.named_parameters())[p] for p, stored in stream.stored(index).items()}
        if name in parameters:
            layer.self_attn.register_forward_hook(lambda module, given, output: outputs.append(output[0]))
            forward(plain)
            parameters[name][:, ::2] = 0
            forward(plain)

    found = streamed(stream, samples(), rehearse=rehearse, budget=budget)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    size = len(outputs) // 3
    dense, zeroed, real = (outputs[i : i + size] for i in (0, size, 2 * size))
    assert not torch.equal(dense[0], zeroed[0]) and all(torch.equal(a, b) for a, b in zip(zeroed, real, strict=True))


@both_ways
def test_hooks_see_every_batch_once(tiny_checkpoint, budget):
    """In each forward and never besides, though spilled layers run twice; they stay until removed."""
    stream, seen = open_stream(tiny_checkpoint("qwen2_moe")), Counter()
    plain = plain_walk(stream.checkpoint, stream.dtype)
    layer = stream.layers[1]
    handles = [
        module.register_forward_hook(lambda module, *_, name=name: seen.update([name]))
        for name, module in layer.named_modules()
    ]
    layer.register_forward_pre_hook(lambda *_: seen.update(["before"]))

    def rehearse(index, layer, forward):
        forward(plain)

    num_batches = 5
    streamed(stream, samples(), rehearse=rehearse, budget=budget)
    names = {name for name, _ in layer.named_modules() if not name.startswith("mlp.experts.")} | {"before"}
    assert {name: seen[name] for name in names} == dict.fromkeys(names, 2 * num_batches)
    for handle in handles:
        handle.remove()
    streamed(stream, samples(), budget=budget)
    assert seen[""] == 2 * num_batches and seen["before"] == 3 * num_batches


@every_family
def test_stored_names_are_of_equal_values(tiny_checkpoint, model_type):
    """Every parameter outside the experts has its tensor, except what transformers transposes or makes out of
    several."""
    stream, missing = open_stream(tiny_checkpoint(model_type)), set()
    for index, layer in enumerate(stream.layers):
        stream._skeleton.load(index)
        closed = {id(p) for m in moe.experts_modules(layer) for p in m.parameters(recurse=False)}
        parameters = {name: p for name, p in layer.named_parameters() if id(p) not in closed}
        found = stream.stored(index)
        assert found.keys() <= parameters.keys()
        for name, stored in found.items():
            values = torch.tensor(stream.checkpoint.read(stored))
            assert torch.equal(parameters[name].float(), values.float()), name
        missing |= parameters.keys() - found.keys()
    fused = {"minimax_m3_vl": {"mlp.shared_experts.gate_up_proj.weight"}}
    fused |= {name: {"self_attn.conv1d.weight"} for name in ("bailing_hybrid", "glm5_next", "kimi_linear")}
    gates = {f"mlp.{stack}_moe.gate" for stack in ("text", "vision")}  # routers stored (in, out), biases of both in one
    fused["ernie4_5_vl_moe"] = {
        f"{gate}.{n}" for gate in gates for n in ("weight", "moe_statics.e_score_correction_bias")
    }
    assert missing == fused.get(model_type, set())


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", OPENED)
def test_closed_experts_are_refused(tiny_checkpoint, model_type, monkeypatch):
    """Before anything is read, naming the layer: as those of a family would be that nobody opened yet."""
    monkeypatch.setattr(opened, "OPENED", {})
    with pytest.raises(CoterieError, match=r"layer [03]: .* not open to transformers' registry.* needs no data"):
        open_stream(tiny_checkpoint(model_type))


@pytest.mark.parametrize("model_type", TALKATIVE)
def test_layers_that_pass_more_than_hidden_states_are_refused(tiny_checkpoint, model_type):
    """Before anything is built, naming the model type."""
    with pytest.raises(CoterieError, match=r"layers of '\w+' pass each other more than hidden states.*needs no data"):
        open_stream(tiny_checkpoint(model_type))


@pytest.mark.parametrize("model_type", TALKATIVE)
def test_a_stream_finds_out_by_itself_what_layers_pass_each_other(tiny_checkpoint, model_type, monkeypatch):
    """Before the first layer runs, naming the decoder: as of a model that nobody has looked at."""
    monkeypatch.setitem(UNABLE, "stream", ())
    stream = open_stream(tiny_checkpoint(model_type))
    with pytest.raises(CoterieError, match=r"layers of \w+ pass each other more than hidden states.*needs no data"):
        stream.embed(samples())


@pytest.mark.parametrize("model_type", [t for t in tiny.model_types() if not registry()[t].stock])
def test_families_that_transformers_does_not_build_are_refused(tiny_checkpoint, model_type):
    """A family without a stock class has no layers to run; its own code is never run."""
    with pytest.raises(
        CoterieError, match=r"transformers has no causal language model for \w+; use a method that needs no data"
    ):
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
        return (hidden,)

    monkeypatch.setattr(stream.decoder, "forward", forward)
    with pytest.raises(CoterieError, match="arguments depend on the layers before"):
        stream.embed(samples())


def test_an_end_that_depends_on_layers_before_is_refused(tiny_checkpoint, monkeypatch):
    """Not only the last layer's output: what the head sees could not be told from that alone."""
    stream = open_stream(tiny_checkpoint("qwen2_moe"))

    def forward(input_ids, use_cache):
        hidden, total = stream.decoder.embed_tokens(input_ids), 0
        for layer in stream.layers:
            total = total + hidden
            hidden = layer(hidden)
        return (hidden + total,)

    monkeypatch.setattr(stream.decoder, "forward", forward)
    with pytest.raises(CoterieError, match="the end depends on more than the last layer"):
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


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damage_outside_the_experts_names_the_layer(tiny_checkpoint, tmp_path, value):
    """A layer's output that is no number is refused where it appears, whatever the walk looks at."""
    values, config = tiny.read(tiny_checkpoint("deepseek_v3"))
    values["model.layers.0.mlp.down_proj.weight"][3, 3] = value
    with pytest.raises(CoterieError, match="layer 0: hidden states are NaN or infinite"):
        streamed(open_stream(tiny.write(tmp_path / "m", values, config)), samples())


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda mlp, x: mlp(x + torch.rand(())), "layer 0 gives its experts something else when it runs again, so"),
        (lambda mlp, x: mlp(mlp(x)), r"Qwen2Moe\w+ runs before and after the experts, so"),
        (lambda mlp, x: mlp.experts(mlp.experts(x[0], *CHOICE), *CHOICE)[None], "layer 0 calls its experts twice, so"),
        (lambda mlp, x: mlp(x[:, :-1]), r"layer 0 asks for 23 rows of 24 tokens, so"),
        (lambda mlp, x: x, "layer 0 does not call its experts, so"),
    ],
)
def test_layers_that_do_not_repeat_cannot_spill(tiny_checkpoint, forward, reason):
    """Their second run would not be the first one's end."""
    stream = open_stream(tiny_checkpoint("qwen2_moe"))
    batches, layer = stream.embed(samples((24,)), budget=0), stream.layers[0]
    layer.forward = lambda hidden, *args, **kwargs: forward(layer.mlp, hidden)
    with pytest.raises(CoterieError, match=f"{reason}.* activations cannot leave memory; calibrate on fewer"):
        list(stream.run(batches, plain_walk(stream.checkpoint, stream.dtype)))


def test_an_unknown_tensor_in_a_layer_is_refused(tiny_checkpoint, tmp_path):
    """A tensor that the model has no place for is named, not skipped."""
    tensors, config = tiny.read(tiny_checkpoint("qwen2_moe"))
    tensors["model.layers.1.self_attn.extra.weight"] = np.ones(3, np.float32)
    with pytest.raises(CoterieError, match=r"transformers does not take .*layers\.1\.self_attn\.extra"):
        streamed(open_stream(tiny.write(tmp_path / "m", tensors, config)), samples())


def test_quantised_weights_without_their_scales_are_refused(tiny_checkpoint, tmp_path):
    """FP8 attention weights need scales, where the config says that the model was quantised."""
    tensors, _ = tiny.read(tiny_checkpoint("qwen2_moe"))
    folder = tmp_path / "m"
    shutil.copytree(tiny_checkpoint("qwen2_moe"), folder)
    changed = {n: torch.from_numpy(v) for n, v in tensors.items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(changed | {name: changed[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CoterieError, match=rf"outside the experts .*{re.escape(name)}': F8_E4M3 without a scale"):
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
    """A model that is told to use it outside a stream is refused, while a stream is inside a layer as well."""
    stream = open_stream(tiny_checkpoint("qwen2_moe"))
    model, _ = load_stock(tiny_checkpoint("qwen2_moe"), "float32", experts_implementation=moe.IMPLEMENTATION)
    assert moe.IMPLEMENTATION in ALL_EXPERTS_FUNCTIONS

    def call(routed=None):
        with pytest.raises(CoterieError, match="only inside a streaming forward"):
            model(input_ids=torch.tensor([[5, 6]]))
        return routed.zeros() if routed else None

    call()
    assert next(stream.run(stream.embed(samples()), call)) == 0


def test_streams_do_not_know_of_each_other(tiny_checkpoint):
    """Of different models, advanced in turns, and one inside the other's walk: each as alone."""
    streams = [open_stream(tiny_checkpoint(model_type)) for model_type in ("qwen2_moe", "gpt_oss")]
    plain = [plain_walk(stream.checkpoint, stream.dtype) for stream in streams]
    alone = [streamed(stream, samples(), walk) for stream, walk in zip(streams, plain, strict=True)]
    batches = [stream.embed(samples(), 48) for stream in streams]
    inner = streams[1].run(batches[1], plain[1])

    def walk(routed):
        next(inner, None)
        return plain[0](routed)

    for _ in streams[0].run(batches[0], walk):
        next(inner, None)
    assert next(inner, None) is None
    for stream, given, expected in zip(streams, batches, alone, strict=True):
        found = {i: row for batch in given for i, row in zip(batch.samples, stream.logits(batch), strict=True)}
        assert all(torch.equal(found[i], e) for i, e in enumerate(expected))


def test_an_output_changed_in_place_is_computed_again(tiny_checkpoint):
    """By the layer, between one of its parts and its experts: the second run does not start from what it became."""
    stream, found = open_stream(tiny_checkpoint("qwen2_moe")), []
    layer = stream.layers[0]
    for double in (torch.Tensor.mul, torch.Tensor.mul_):
        layer.forward = lambda x, *_, double=double, **__: x + layer.mlp(double(layer.input_layernorm(x), 2))
        found.append(streamed(stream, samples()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_are_off(tiny_checkpoint):
    """No graph is kept, though the caller says nothing."""
    stream = open_stream(tiny_checkpoint("qwen2_moe"))
    assert torch.is_grad_enabled()
    assert not any(logits.requires_grad for logits in streamed(stream, samples()))
    assert torch.is_grad_enabled()
