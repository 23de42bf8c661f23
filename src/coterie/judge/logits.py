"""Whether OUT computes what the original does, once that is masked or condensed alike. Checks of `verify`."""

from __future__ import annotations

from typing import Any

from coterie.codecs.open import inexact
from coterie.edits.kinds.convert import converted
from coterie.edits.kinds.dequantise import dequantised
from coterie.edits.lineage import plan_of
from coterie.edits.plan import Plan, kinds
from coterie.errors import CoterieError
from coterie.forward.data import Document, encode
from coterie.judge.files import Answer, first
from coterie.judge.loads import float32_short, load_float32
from coterie.model import causal
from coterie.model.layer import Model
from coterie.storage.checkpoint import Checkpoint

NUM_BLOCKS, BLOCK = 2, 64  # sequences and tokens of the random batch, and of a text
ROUNDING = 1e-5  # of the largest logit; a wrong expert shows as 1e-2 and more


def sequences_of(out: Checkpoint, documents: list[Document] | None, model: Any) -> list[list[int]]:
    """Token ids to compute logits on. Raises: CoterieError for ids that the model does not know."""
    vocabulary: int = model.config.get_text_config().vocab_size
    if documents is None:
        return _random_sequences(model, vocabulary)
    tokenizer = None
    if any(d.input_ids is None for d in documents):
        from coterie.model.loading import load_tokenizer

        tokenizer = load_tokenizer(out.path)
    sequences: list[list[int]] = []
    for document in documents:
        tokens = encode(document, tokenizer)
        cut = [tokens] if document.input_ids else [tokens[i : i + BLOCK] for i in range(0, len(tokens), BLOCK)]
        sequences += cut if document.input_ids else cut[: max(0, NUM_BLOCKS - len(sequences))]
    largest = max((t for s in sequences for t in s), default=None)
    if largest is None or largest >= vocabulary:
        found = "no tokens" if largest is None else f"token {largest}"
        raise CoterieError(f"{documents[0].where}: found {found}; expected ids below {vocabulary:,}")
    return sequences


def _random_sequences(model: Any, vocabulary: int) -> list[list[int]]:
    import numpy as np

    shape = (NUM_BLOCKS, min(BLOCK, causal.positions(model) or BLOCK))
    return np.random.default_rng(0).integers(0, vocabulary, shape).tolist()


def _forward(model: Any, sequences: list[list[int]]) -> list[Any]:
    """Logits of each sequence, one forward each: (T, vocabulary) float32."""
    import torch

    from coterie.model.loading import quiet_transformers

    model = causal.without_router_loss(model)
    with quiet_transformers(), torch.inference_mode():
        return [model(input_ids=torch.tensor([s]), use_cache=False).logits[0].float() for s in sequences]


def check_computes(model: Any, sequences: list[list[int]]) -> Answer:
    """The model's logits are finite."""
    if model is None:
        return True, "not computed: no model was loaded", None
    try:
        logits = _forward(model, sequences)
    except Exception as error:  # whatever modelling code raises for a wrong checkpoint
        return False, f"the forward pass failed: {type(error).__name__}: {error!s:.300}", None
    tokens = f"{sum(map(len, sequences)):,} tokens in {len(sequences)} sequence(s)"
    bad = sum(int((~values.isfinite()).sum()) for values in logits)
    if bad:
        return False, f"{bad:,} logits are NaN or infinite, on {tokens}", None
    return True, f"finite logits on {tokens}", logits


def check_logits(out: Checkpoint, source: Model, sequences: list[list[int]], logits: list[Any] | None) -> Answer:
    """OUT computes exactly what the original does when its routers cannot choose the dropped experts."""
    from coterie.edits.masked import mask_experts, route_original

    plan = plan_of(out)
    if logits is None:
        return True, "not compared: OUT gave no logits", None
    if inexact(out):
        return True, "not compared: packing rounded weights to int8", None
    if reason := next((why for kind in reversed(kinds()) if (why := kind.unlike(plan))), ""):
        return True, f"not compared: {reason}", None
    if plan.condensed or plan.dropped or plan.converted:
        return _check_explicit(source, plan, sequences, logits)
    short = float32_short(source.checkpoint)
    if short:
        return True, f"not compared: the original {short}", None
    model, faults = load_float32(source.checkpoint)
    if faults:
        raise CoterieError(f"{source.checkpoint.path}: the original itself does not load: {first(faults)}")
    before = _forward(model, sequences)
    routing, num_routed = mask_experts(model, source, plan), route_original(model, source, plan, out)
    with routing:
        expected = _forward(model, sequences)
    idle = [name for name, hits in routing.hits.items() if hits == 0]
    if idle:
        return False, f"not a comparison: the router of {first(idle)} was never seen at work in the original", None
    moved, num_changed = _largest_gap(before, expected), len(routing.hits) + num_routed
    ok, detail = _judge(_largest_gap(logits, expected), expected)
    return ok, f"{detail}; leaving experts out of {num_changed} routers moved them by up to {moved:.3g}", None


def _check_explicit(source: Model, plan: Plan, sequences: list[list[int]], logits: list[Any]) -> Answer:
    """OUT computes what the original does with its condensed blocks as plain sums, and without its dropped layers."""
    from coterie.judge.explicit import explicit_logits

    try:
        expected = explicit_logits(dequantised(converted(source, plan.converted), plan), plan, sequences)
    except CoterieError as error:
        return True, f"not compared: {error}", None
    ok, detail = _judge(_largest_gap(logits, expected), expected)
    what = f"{len(plan.condensed)} condensed layers as explicit sums" if plan.condensed else "explicit forward"
    return ok, f"{detail}; {what}, {len(plan.dropped)} layers skipped", None


def _judge(gap: float, expected: list[Any]) -> tuple[bool, str]:
    """Equal to the last bit, or but for sums whose order a family's router makes depend on the number of experts."""
    if gap == 0.0:
        return True, "bit-equal"
    scale = max(float(values.abs().max()) for values in expected)
    if gap <= ROUNDING * scale:
        return True, f"equal but for rounding (up to {gap:.2g})"
    return False, f"they differ by up to {gap:.3g}"


def _largest_gap(a: list[Any], b: list[Any]) -> float:
    """max |a - b|; NaN, which equals nothing, becomes infinity."""
    gaps = [float((x - y).abs().max()) if x.shape == y.shape else float("inf") for x, y in zip(a, b, strict=True)]
    return max((float("inf") if gap != gap else gap for gap in gaps), default=0.0)
