"""A planned checkpoint reads as the one that will be written; a plan upon a plan comes to the same bytes."""

import torch

import tiny
from coterie.edits.kinds.convert import converted
from coterie.edits.outputs import plan_outputs, planned
from coterie.edits.plan import Choice, Condensed, Plan
from coterie.model.layer import Model
from coterie.model.moe import read_expert
from coterie.storage.checkpoint import Checkpoint
from coterie.storage.planned import resolved, root
from coterie.verbs.apply import apply


def kept(model, *experts):
    return Plan({block.key: Choice(experts) for block in model.moe}, budget={})


def test_a_planned_checkpoint_reads_as_the_written_one(tiny_checkpoint, tmp_path):
    """Every tensor, whole and in part, numbered and fused."""
    for fused in (False, True):
        model = Model.open(tiny_checkpoint("qwen3_moe", fused))
        plan = kept(model, 0, 3, 4, 7)
        view = planned(model, plan, plan_outputs(model, plan)).checkpoint
        apply(model.checkpoint.path, plan.as_dict(), tmp_path / str(fused))
        written = Checkpoint.open(tmp_path / str(fused))
        assert view.tensors.keys() == written.tensors.keys()
        for name, tensor in written.tensors.items():
            assert view.raw(name) == written.raw(name)
            assert view.raw(name, 5, tensor.num_bytes - 9) == written.raw(name, 5, tensor.num_bytes - 9)
        assert view.hash == model.checkpoint.hash and root(view) is model.checkpoint


def test_experts_of_a_planned_checkpoint_are_its_own(tiny_checkpoint):
    """Expert 1 of those kept is the original's expert 3, also where bytes are read straight into tensors."""
    for fused in (False, True):
        model = Model.open(tiny_checkpoint("qwen3_moe", fused))
        plan = kept(model, 0, 3, 4, 7)
        view = planned(model, plan, plan_outputs(model, plan))
        found = read_expert(view.checkpoint, view.moe[2], 1, torch.float32)
        expected = read_expert(model.checkpoint, model.moe[2], 3, torch.float32)
        assert torch.equal(found.gate_up, expected.gate_up) and torch.equal(found.down, expected.down)


def test_a_plan_upon_a_plan_names_bytes_of_the_files(tiny_checkpoint, tmp_path):
    """Pruning a converted model: its runs, resolved, give what pruning the written conversion gives."""
    tensors, config = tiny.read(tiny_checkpoint("mixtral"))
    folder = tiny.write(tmp_path / "m", tensors, config | {"sliding_window": None})
    view = converted(Model.open(folder), "qwen2_moe")
    outputs = plan_outputs(view, kept(view, 1, 2, 5, 6))
    apply(folder, {"layers": {}, "converted": "qwen2_moe"}, tmp_path / "q")
    written = Model.open(tmp_path / "q")
    apply(tmp_path / "q", kept(written, 1, 2, 5, 6).as_dict(), tmp_path / "cut")
    twice = planned(view, kept(view, 1, 2, 5, 6), outputs).checkpoint
    cut = Checkpoint.open(tmp_path / "cut")
    assert all(twice.raw(name) == cut.raw(name) for name in cut.tensors)
    assert resolved(written.checkpoint, outputs) is outputs  # of a checkpoint on the disk there is nothing to resolve


def test_a_condensed_view_holds_the_folded_matrices(tiny_checkpoint):
    """Computed parts are made when they are read."""
    model = Model.open(tiny_checkpoint("qwen2_moe"))
    plan = Plan({}, condensed={"1": Condensed((2, 6), (0.5, 0.25), 2.0)})
    view = planned(model, plan, plan_outputs(model, plan)).checkpoint
    source, at = model.checkpoint, "model.layers.1.mlp."
    down = view.read(f"{at}down_proj.weight")
    assert (down[:, :24] == 2 * source.read(f"{at}shared_expert.down_proj.weight")).all()
    assert (down[:, 24:40] == 0.5 * source.read(f"{at}experts.2.down_proj.weight")).all()
    assert (down[:, 40:] == 0.25 * source.read(f"{at}experts.6.down_proj.weight")).all()
