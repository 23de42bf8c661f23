"""Tokens per second of loaded models, measured in turns: a busy machine then slows all of them, not one.

Used by `coterie report`. Importing this module imports torch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from coterie.errors import CoterieError
from coterie.loading import quiet_transformers
from coterie.report import Progress

ROUNDS = 5
PROMPT, NEW = 256, 32  # tokens; fewer where the model's positions end


def measure(models: Sequence[Any], *, seed: int, on_progress: Progress) -> list[dict[str, Any]]:
    """Of each model, `{"prefill", "decode": {"value", "low", "high"}, "relative_decode", "prompt", "new"}`.

    One sequence, greedy, with a cache. Prefill: prompt tokens over the seconds until the first new token; decode: new
    tokens after the first over the seconds they take. Values are medians of 5 rounds, low and high their extremes; in
    a round every model runs once, in an order that alternates, after one run each that does not count.
    `relative_decode` is the median over rounds of the decode speed over that of the first model.
    """
    limits = [getattr(m.config.get_text_config(), "max_position_embeddings", None) for m in models]
    room = min([PROMPT + NEW + 1, *(limit for limit in limits if limit is not None)])
    vocabulary = min(m.config.get_text_config().vocab_size for m in models)
    new = min(NEW, room // 3)
    if new < 1:
        raise CoterieError(f"the models have {room} positions; expected at least 3 to measure speed")
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(vocabulary, (1, room - new - 1), generator=generator)
    rounds: list[list[tuple[float, float]]] = [[] for _ in models]
    for number in range(ROUNDS + 1):
        order = range(len(models)) if number % 2 else reversed(range(len(models)))
        for i in order:
            found = _speeds(models[i], prompt, new)
            if number:
                rounds[i].append(found)
        on_progress("measuring speed", number + 1, ROUNDS + 1)
    first = [decode for _, decode in rounds[0]]
    return [_summary(found, first, prompt.shape[1], new) for found in rounds]


@torch.inference_mode()
def _speeds(model: Any, prompt: torch.Tensor, new: int) -> tuple[float, float]:
    """(prefill, decode) in tokens per second, of one run."""
    from transformers import GenerationConfig

    times: list[float] = []

    def stamp(rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        float(scores[0, 0])  # waits for a GPU
        times.append(time.perf_counter())
        return scores

    theirs, ids = model.generation_config, prompt.to(model.device)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=new + 1, eos_token_id=None, pad_token_id=0
    )
    try:
        with quiet_transformers():
            began = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=[stamp])
    finally:
        model.generation_config = theirs
    assert len(times) == new + 1, "generation stopped early"
    return prompt.shape[1] / (times[0] - began), new / (times[-1] - times[0])


def _summary(rounds: list[tuple[float, float]], first: list[float], prompt: int, new: int) -> dict[str, Any]:
    prefill, decode = (list(column) for column in zip(*rounds, strict=True))
    relative = statistics.median(own / theirs for own, theirs in zip(decode, first, strict=True))
    spread = {
        name: {"value": statistics.median(found), "low": min(found), "high": max(found)}
        for name, found in (("prefill", prefill), ("decode", decode))
    }
    return {**spread, "relative_decode": relative, "prompt": prompt, "new": new}
