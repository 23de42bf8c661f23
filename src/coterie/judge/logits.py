"""Whether OUT computes what the original does, once that is masked or condensed alike. Checks of `verify`."""

from __future__ import annotations

from typing import Any

from coterie.codecs.open import inexact
from coterie.edits.kinds.convert import converted
from coterie.edits.kinds.dequantise import dequantised
from coterie.edits.lineage import plan_of
from coterie.edits.plan import Plan, kinds
from coterie.errors import CoterieError
from coterie.forward.documents import Document
from coterie.forward.tokens import encode
from coterie.judge.files import Answer, first
from coterie.judge.loads import float32_short, float64_short, load_plain, unjudged
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


def check_computes(
    out: Checkpoint, model: Any, sequences: list[list[int]], original: Checkpoint | None = None
) -> Answer:
    """The model's logits are finite. Where the original's fail likewise it is no fault of OUT."""
    if model is None:
        return True, "not computed: no model was loaded", None
    logits, fault, sign = _outcome(model, sequences)
    tokens = f"{sum(map(len, sequences)):,} tokens in {len(sequences)} sequence(s)"
    if not fault:
        return True, f"finite logits on {tokens}", logits
    if excuse := _excuse(out, original, sequences, sign):
        return True, f"not computed: {excuse} ({fault}, on {tokens})", None
    return False, f"{fault}, on {tokens}", None


def _outcome(model: Any, sequences: list[list[int]]) -> tuple[list[Any], str, str]:
    """The logits, what is wrong with them ("" if nothing), and of which kind that is."""
    try:
        logits = _forward(model, sequences)
    except Exception as error:  # whatever modelling code raises for a wrong checkpoint
        kind = type(error).__name__
        return [], f"the forward pass failed: {kind}: {error!s:.300}", kind
    bad = sum(int((~values.isfinite()).sum()) for values in logits)
    return logits, *((f"{bad:,} logits are NaN or infinite", "not finite") if bad else ("", ""))


def _excuse(out: Checkpoint, original: Checkpoint | None, sequences: list[list[int]], sign: str) -> str:
    """Why the logits' failure is no fault of OUT: the original's fail likewise, or could; empty if it is one."""
    if original is None:
        return "" if sign == "not finite" else unjudged(out)
    if float32_short(original):
        return ""
    model, faults = load_plain(original)
    return "" if faults or _outcome(model, sequences)[2] != sign else "the original does no better"


def check_logits(out: Checkpoint, source: Model, sequences: list[list[int]], logits: list[Any] | None) -> Answer:
    """OUT computes exactly what the original does when its routers cannot choose the dropped experts."""
    plan = plan_of(out)
    if logits is None:
        return True, "not compared: OUT gave no logits", None
    if inexact(out):
        return True, "not compared: its experts were rounded to few bits when it was written", None
    if reason := next((why for kind in reversed(kinds()) if (why := kind.unlike(plan))), ""):
        return True, f"not compared: {reason}", None
    compared = _explicit if plan.condensed or plan.dropped or plan.converted else _masked
    try:
        expected, note = compared(out, source, plan, sequences, "float32")
        if not expected:
            return False, note, None
        ok, detail = _judge(logits, expected)
        if not ok and not any(float64_short(c) for c in (out, source.checkpoint)):
            expected, _ = compared(out, source, plan, sequences, "float64")  # none where routers insist on float32
            precise = _judge(_forward(_loaded(out, "float64"), sequences), expected) if expected else (False, "")
            ok, detail = (True, f"{precise[1]} in float64; in float32 {detail}") if precise[0] else (ok, detail)
    except CoterieError as error:
        return True, f"not compared: {error}", None
    return ok, f"{detail}; {note}", None


def _loaded(checkpoint: Checkpoint, dtype: str) -> Any:
    """The model. Raises: CoterieError where it does not load whole."""
    model, faults = load_plain(checkpoint, dtype=dtype)
    if faults:
        raise CoterieError(f"{checkpoint.path}: does not fill its model ({first(next(iter(faults.values())))})")
    return model


def _masked(
    out: Checkpoint, source: Model, plan: Plan, sequences: list[list[int]], dtype: str
) -> tuple[list[Any], str]:
    """The original's logits when its routers know only what the plan keeps, and what that changed; none, and why, where
    that changed nothing that was computed. Raises: CoterieError where the original cannot be computed so."""
    from coterie.edits.masked import mask_experts, route_original

    short = float32_short(source.checkpoint)
    if short:
        raise CoterieError(f"the original {short}")
    model = _loaded(source.checkpoint, dtype)
    before = _forward(model, sequences)
    routing, num_routed = mask_experts(model, source, plan), route_original(model, source, plan, out)
    with routing:
        expected = _forward(model, sequences)
    idle = [name for name, hits in routing.hits.items() if hits == 0]
    if idle:
        return [], f"not a comparison: the router of {first(idle)} was never seen at work in the original"
    moved, num_changed = _largest_gap(before, expected), len(routing.hits) + num_routed
    return expected, f"leaving experts out of {num_changed} routers moved them by up to {moved:.3g}"


def _explicit(
    out: Checkpoint, source: Model, plan: Plan, sequences: list[list[int]], dtype: str
) -> tuple[list[Any], str]:
    """The original's logits with its condensed blocks as plain sums, and without its dropped layers."""
    from coterie.judge.explicit import explicit_logits

    expected = explicit_logits(dequantised(converted(source, plan.converted), plan), plan, sequences, dtype)
    what = f"{len(plan.condensed)} condensed layers as explicit sums" if plan.condensed else "explicit forward"
    return expected, f"{what}, {len(plan.dropped)} layers skipped"


def _judge(logits: list[Any], expected: list[Any]) -> tuple[bool, str]:
    """Equal to the last bit, or but for sums whose order a family's router makes depend on the number of experts.

    Where a router is nearly undecided, or layers amplify, that rounding alone can grow beyond the limit in float32, on
    one processor and not on another: in float64 it does not, and a wrong expert is as wrong as it was.
    """
    gap = _largest_gap(logits, expected)
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
