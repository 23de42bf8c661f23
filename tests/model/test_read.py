"""`coterie.read_expert`: one expert's matrices from every layout and storage form."""

import numpy as np
import pytest

import coterie
import tiny
from coterie.errors import CoterieError


@pytest.mark.parametrize("fused", [False, True], ids=["numbered", "fused"])
def test_an_expert_is_what_transformers_computes_with(tiny_checkpoint, fused):
    """Of both spellings: the rows of the stock module's fused weights."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint("qwen3_moe", fused)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    experts = model.model.layers[1].mlp.experts
    gate, up, down = coterie.read_expert(folder, 1, 3)
    assert np.array_equal(np.concatenate([gate, up]), experts.gate_up_proj[3].detach().numpy())
    assert np.array_equal(down, experts.down_proj[3].detach().numpy())
    assert {m.dtype for m in (gate, up, down)} == {np.dtype(np.float32)}


def test_packed_zeros_are_decoded(tiny_checkpoint, tmp_path):
    """Zeros stored as bits give the very weights."""
    source = tiny_checkpoint("qwen3_moe")
    coterie.sparsify(source, tmp_path / "zeros", method="magnitude", sparsity=0.5)
    coterie.pack(tmp_path / "zeros", tmp_path / "packed")
    for ours, theirs in zip(
        coterie.read_expert(tmp_path / "packed", 1, 0), coterie.read_expert(tmp_path / "zeros", 1, 0), strict=True
    ):
        assert np.array_equal(ours, theirs) and (ours == 0).any()


def test_families_without_a_gate_have_none(tiny_checkpoint):
    """Nemotron's experts are two matrices."""
    gate, up, down = coterie.read_expert(tiny_checkpoint("nemotron_h"), first_layer(tiny_checkpoint("nemotron_h")), 0)
    assert gate is None and up.shape == down.shape[::-1]


def first_layer(folder):
    from coterie.model.layer import Model

    return Model.open(folder).main[0].key


@pytest.mark.parametrize(
    ("layer", "expert", "says"), [(99, 0, "no routed experts"), (1, 8, "expected 0 to 7"), (1, True, "expert True")]
)
def test_what_is_not_there_is_refused(tiny_checkpoint, layer, expert, says):
    """A layer or an expert that the model does not have."""
    assert tiny.NUM_EXPERTS == 8
    with pytest.raises(CoterieError, match=says):
        coterie.read_expert(tiny_checkpoint("qwen3_moe"), layer, expert)
