"""Trains the second reference model: a Mixtral whose 8 experts began as copies of one dense MLP.

    python -m coterie.reference_model.data CORPUS
    python -m coterie.reference_model.upcycle CORPUS OUT      (interrupt and run again to resume)

The first half of the steps trains a dense model, which is a Mixtral of one expert. Then every layer's MLP is copied
into all experts, routers start anew, and the second half trains on: experts that resemble each other, as in models made
this way. Its widths are multiples of 128, the group of stock 4-bit kernels. Data, order, batch, optimiser and rate are
those of the first reference model (`train.py`).
Source: sparse upcycling (arXiv 2212.05055). Deviates: gate weights add up to 1, so that at first nothing changes.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from coterie.reference_model.train import CONFIG as FIRST
from coterie.reference_model.train import SEQ_LEN, finish, prepare, ready, teach

NUM_EXPERTS, TOP_K = 8, 2


def config(num_experts: int, top_k: int) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=FIRST.vocab_size,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        output_router_logits=True,
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )


def upcycled(dense: Any) -> Any:
    """A model of `NUM_EXPERTS` experts that computes what the dense one does: each expert is its MLP."""
    model = MixtralForCausalLM(config(NUM_EXPERTS, TOP_K))
    weights = dense.state_dict()
    for name, value in model.state_dict().items():
        if ".experts." in name:
            weights[name] = weights[name].expand_as(value).clone()
        elif weights[name].shape != value.shape:  # a router
            weights[name] = value
    model.load_state_dict(weights)
    return model


def upcycle(corpus: Path, out: Path, *, steps: int, seed: int = 0) -> None:
    sequences, half = prepare(corpus, out, seed), steps // 2
    dense = ready(MixtralForCausalLM(config(1, 1)), experts="eager")  # of few experts a loop is faster than tiles
    teach(dense, sequences, out / "dense", steps=steps, part=range(half), seed=seed)
    torch.manual_seed(seed + 1)
    model = ready(upcycled(dense), experts="eager")
    teach(model, sequences, out, steps=steps, part=range(half, steps), seed=seed)
    finish(model, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    upcycle(arguments.corpus, arguments.out, steps=arguments.steps)
