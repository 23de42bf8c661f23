"""The reference model's recipe: its steps against a loop written out by hand, and its resumption."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from coterie.reference_model import train, upcycle
from coterie.reference_model.train import BALANCE, CONFIG, DOMAINS, balance_loss, batch_at, learning_rate, ready, teach
from coterie.train.loop import Learner

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
NARROW = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "intermediate_size": 8}
STEPS = 12


def tiny():
    """The recipe's model, but small, and in the recipe's bfloat16."""
    torch.manual_seed(0)
    fewer = {"num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 50}
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**{**CONFIG.to_diff_dict(), "layer_types": None, **SMALL, **NARROW, **fewer})
    ).bfloat16()


@pytest.fixture(scope="module")
def sequences():
    """A few rows of 9 tokens a domain."""
    rng = np.random.default_rng(0)
    return {domain: rng.integers(0, 50, (20, 9)).astype(np.uint16) for domain in DOMAINS}


def by_hand(sequences):
    """The weights after all steps, and the losses of every tenth."""
    model, losses = tiny(), []
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    groups = [
        {"params": [m for m in masters if m.dim() > 1], "weight_decay": 0.1},
        {"params": [m for m in masters if m.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(STEPS):
        ids = batch_at(sequences, step, 0)
        output = model(input_ids=ids[:, :-1], use_cache=False)
        loss = F.cross_entropy(output.logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        (loss + BALANCE * balance_loss(output.router_logits, 2)[0]).backward()
        losses += [loss.item()] if step % 10 == 0 else []
        for p, master in zip(model.parameters(), masters, strict=True):
            master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        for group in adam.param_groups:
            group["lr"] = learning_rate(step, STEPS)
        adam.step()
        with torch.no_grad():
            for p, master in zip(model.parameters(), masters, strict=True):
                p.copy_(master)
    return model, losses


def test_the_recipe_takes_the_steps_of_a_plain_loop(sequences, tmp_path):
    """The same weights, and the log's losses."""
    model, (expected, losses) = tiny(), by_hand(sequences)
    teach(model, sequences, tmp_path, steps=STEPS)
    for name, weights in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weights, rtol=1e-2, atol=1e-5)
    assert any(not torch.equal(weights, tiny().state_dict()[name]) for name, weights in expected.state_dict().items())
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [0, 10]
    assert [line["loss"] for line in log] == pytest.approx(losses, abs=1e-3)
    assert all(line["worst_load"] >= 1 and line["norm"] > 0 for line in log)


def test_an_interrupted_recipe_goes_on(sequences, tmp_path, monkeypatch):
    """From the last saved state, to the same weights to the last bit."""
    whole, cut, resumed = tiny(), tiny(), tiny()
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    teach(whole, sequences, tmp_path / "whole", steps=STEPS)

    def broken(sequences, step, seed):
        if step == 7:
            raise KeyboardInterrupt
        return batch_at(sequences, step, seed)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("coterie.reference_model.train.batch_at", broken)
        teach(cut, sequences, tmp_path / "cut", steps=STEPS, save_every=5)
    teach(resumed, sequences, tmp_path / "cut", steps=STEPS)
    assert all(torch.equal(resumed.state_dict()[name], weights) for name, weights in whole.state_dict().items())


def test_upcycled_experts_compute_what_the_dense_model_did():
    """Eight copies under any router give the dense model's logits; experts are alike, and router rows are not."""
    torch.manual_seed(0)
    dense = ready(MixtralForCausalLM(upcycle.config(1, 1)))
    model = ready(upcycle.upcycled(dense))
    ids = torch.randint(0, CONFIG.vocab_size, (2, 16))
    with torch.no_grad():
        assert torch.allclose(model(ids).logits.float(), dense(ids).logits.float(), atol=1e-5)
    for layer, original in zip(model.model.layers, dense.model.layers, strict=True):
        assert (layer.mlp.experts.down_proj == original.mlp.experts.down_proj).all()
        assert len(layer.mlp.gate.weight.unique(dim=0)) == upcycle.NUM_EXPERTS


def test_a_later_part_of_the_course_takes_its_own_data_and_rate(sequences, tmp_path, monkeypatch):
    """The second half of a course sees the second half's batches, and warms up before it follows the cosine."""
    seen, rates = [], []
    monkeypatch.setattr(train, "batch_at", lambda data, step, seed: seen.append(step) or batch_at(data, step, seed))
    step = Learner.step
    monkeypatch.setattr(
        Learner, "step", lambda self, lesson, ids, rate: rates.append(rate) or step(self, lesson, ids, rate)
    )
    teach(tiny(), sequences, tmp_path, steps=1000, part=range(500, 503))
    assert seen == [500, 501, 502]
    assert rates == [train.LEARNING_RATE * (i + 1) / train.WARMUP for i in range(3)]
    assert rates[2] < learning_rate(502, 1000)
