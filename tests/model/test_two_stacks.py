"""Text and image experts in the same layers: one list of numbers, one count, a router and a row of biases for each."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

import tiny
from coterie.edits.lineage import plan_of
from coterie.edits.masked import MaskedRouting, twin
from coterie.errors import CoterieError
from coterie.model.experts import read_rows
from coterie.model.layer import Model
from coterie.storage.checkpoint import Checkpoint
from coterie.verbs.apply import apply
from coterie.verbs.drop import drop
from coterie.verbs.merge import merge
from coterie.verbs.prune import prune
from coterie.verbs.verify import verify

TYPE, EXPERTS = "ernie4_5_vl_moe", tiny.NUM_EXPERTS
every_spelling = pytest.mark.parametrize("fused", [False, True], ids=["published", "saved"])


def loaded(folder):
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, experts_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@torch.inference_mode()
def states(model):
    """What the decoder makes of one sequence of which every third token is of an image."""
    embedded = torch.randn(1, 24, tiny.HIDDEN, generator=torch.Generator().manual_seed(1))
    of_image = (torch.arange(24) % 3 == 0).int()[None]
    decoder = model.get_decoder()
    return decoder(inputs_embeds=embedded, moe_mm_token_type_ids=of_image, use_cache=False).last_hidden_state


def pruned(source, out):
    """A quarter of each stack, at random, so that they keep different experts."""
    prune(source, out, method="random", ratio=0.25, seed=3)
    return plan_of(Checkpoint.open(out)).layers


def test_the_second_stack_is_named_before_its_layer(tiny_checkpoint):
    """The published list is split in two; what text sees is the decoder's, what images see beside it."""
    model = Model.open(tiny_checkpoint(TYPE))
    assert [block.key for block in model.main] == ["1", "2", "3"]
    assert [block.key for block in model.moe if block.aside] == ["vision.1", "vision.2", "vision.3"]
    names = {
        key: block.experts[0]["up_proj.weight"].rpartition("mlp.")[2] for block in model.moe for key in [block.key]
    }
    assert (names["1"], names["vision.1"]) == ("experts.0.up_proj.weight", f"experts.{EXPERTS}.up_proj.weight")


@every_spelling
def test_both_stacks_are_cut_each_by_its_own_router(tiny_checkpoint, tmp_path, fused):
    """Text and image tokens compute what they do in the original with the experts masked: to the rounding of a softmax,
    which some processors sum in another order over six experts than over eight of which two give zero."""
    source = tiny_checkpoint(TYPE, fused)
    kept = pruned(source, tmp_path / "out")
    assert kept["1"].kept != kept["vision.1"].kept
    whole, routing, model = loaded(source), MaskedRouting(), Model.open(source)
    for block in model.moe:
        routing.hide(block.name, twin(whole, model.checkpoint, block, block.router), kept[block.key].kept)
        dropped = [e for e in range(EXPERTS) if e not in kept[block.key].kept]
        for name in block.rows:
            twin(whole, model.checkpoint, block, name).data[..., dropped] = -torch.inf
    with routing:
        expected = states(whole)
    assert all(routing.hits.values())
    assert torch.allclose(states(loaded(tmp_path / "out")), expected, rtol=0, atol=2e-6)
    assert not torch.allclose(states(loaded(source)), expected, atol=1e-3)
    assert verify(tmp_path / "out", against=source)["ok"]


def test_the_published_spelling_becomes_what_the_saved_one_does(tiny_checkpoint, tmp_path):
    """The same plan, the same model: numbers, columns and shared rows against tensors of their own."""
    for fused in (False, True):
        pruned(tiny_checkpoint(TYPE, fused), tmp_path / str(fused))
    one, other = (loaded(tmp_path / str(fused)).state_dict() for fused in (False, True))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_lists_of_counts_are_patched_as_a_whole(tiny_checkpoint, tmp_path):
    """Remote code counts the stacks one by one; that is no list of layers."""
    prune(tiny_checkpoint("ernie4_5_moe_vl"), tmp_path / "out", ratio=0.25)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["moe_num_experts"] == [6, 6]


@pytest.mark.parametrize(
    ("layers", "budget", "message"),
    [
        ({"vision.1": {"kept": [0, 1, 2, 3, 4]}}, {}, r"different numbers of experts \(5 to 8\)"),
        ({"1": {"kept": [0, 1, 2, 3, 4]}}, {"layout": "coterie"}, r"two stacks .*\(the other is vision\.N\)"),
        ({"vision.0": {"kept": [0, 1]}}, {}, r"layer 'vision\.0' has no experts"),
    ],
)
def test_stacks_of_different_sizes_are_refused(tiny_checkpoint, tmp_path, layers, budget, message):
    """One count serves both, and our own layout knows one stack a layer."""
    (tmp_path / "plan.json").write_text(json.dumps({"layers": layers, "budget": budget}))
    with pytest.raises(CoterieError, match=message):
        apply(tiny_checkpoint(TYPE), tmp_path / "plan.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_expert_beyond_both_stacks_is_refused(tiny_checkpoint, tmp_path):
    """The message counts both."""
    tensors, config = tiny.read(tiny_checkpoint(TYPE))
    tensors["model.layers.1.mlp.experts.16.up_proj.weight"] = np.zeros((8, 32), np.float32)
    with pytest.raises(CoterieError, match="expert 16, but the config counts 8 experts in each of 2 stacks"):
        Model.open(tiny.write(tmp_path / "model", tensors, config))


def test_settings_by_number_follow_both_stacks(tiny_checkpoint, tmp_path):
    """A module of either is renumbered, or goes with its expert."""
    tensors, config = tiny.read(tiny_checkpoint(TYPE))
    named = [f"model.layers.1.mlp.experts.{e}.up_proj" for e in range(2 * EXPERTS)]
    model = tiny.write(tmp_path / "model", tensors, config | {"modules_to_not_convert": named})
    kept = pruned(model, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())["modules_to_not_convert"]
    assert found == [f"model.layers.1.mlp.experts.{e}.up_proj" for e in range(12)]
    before, _ = tiny.read(model)
    after, _ = tiny.read(tmp_path / "out")
    for i, e in enumerate([*kept["1"].kept, *(EXPERTS + e for e in kept["vision.1"].kept)]):
        np.testing.assert_array_equal(after[f"{found[i]}.weight"], before[f"{named[e]}.weight"])


@every_spelling
def test_merged_experts_have_the_means_of_their_rows(tiny_checkpoint, tmp_path, fused):
    """Of columns and of shared rows, too."""
    source = tiny_checkpoint(TYPE, fused)
    pairs = {"kept": [0, 2, 4, 6, 7], "clusters": [[0, 1], [2, 3], [4, 5], [6], [7]], "merged": True}
    layers = {f"{side}{i}": pairs for side in ("", "vision.") for i in (1, 2, 3)}
    (tmp_path / "plan.json").write_text(json.dumps({"layers": layers}))
    apply(source, tmp_path / "plan.json", tmp_path / "out")
    before, after = Model.open(source), Model.open(tmp_path / "out")
    for old, new in zip(before.moe, after.moe, strict=True):
        for name, made in zip((old.router, *old.rows), (new.router, *new.rows), strict=True):
            rows = read_rows(before.checkpoint, old, name).reshape(-1, EXPERTS) if name in old.rows else None
            rows = read_rows(before.checkpoint, old, name) if rows is None else rows.T
            found = read_rows(after.checkpoint, new, made)
            found = found if name == old.router else found.reshape(-1, 5).T
            np.testing.assert_allclose(found[0], rows[:2].mean(axis=0), rtol=1e-6)
            np.testing.assert_array_equal(found[4], rows[7])
    assert verify(tmp_path / "out", against=source)["ok"]


def test_merging_by_data_loads(tiny_checkpoint, tmp_path):
    """What text does is measured; the images' experts are merged without it."""
    data = tiny.id_lines(tmp_path / "a.jsonl", 4, 24)
    merge(tiny_checkpoint(TYPE), tmp_path / "out", experts=6, data=data, samples=4, seq_len=24)
    loaded(tmp_path / "out")


@every_spelling
def test_a_dropped_layer_takes_both_stacks(tiny_checkpoint, tmp_path, fused):
    """Those behind it move up together."""
    source = tiny_checkpoint(TYPE, fused)
    data = tiny.id_lines(tmp_path / "a.jsonl", 4, 24)
    drop(source, tmp_path / "out", unit="block", count=1, data=data, samples=4, seq_len=24)
    left = [block.key for block in Model.open(tmp_path / "out").moe]
    assert len(left) == 2 * len([key for key in left if key.startswith("vision.")])
    assert verify(tmp_path / "out", against=source)["ok"]


def test_lists_of_stacks_are_not_of_layers(tiny_checkpoint, tmp_path):
    """Two layers or more: sizes stay, and where experts begin and end moves, entry by entry."""
    (tmp_path / "plan.json").write_text(json.dumps({"layers": {}, "dropped": [0]}))
    source = tiny_checkpoint("ernie4_5_moe_vl")
    apply(source, tmp_path / "plan.json", tmp_path / "out")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    moved = {"num_hidden_layers": 2, "moe_layer_start_index": [0, 0], "moe_layer_end_index": [1, 1]}
    assert after == before | moved
