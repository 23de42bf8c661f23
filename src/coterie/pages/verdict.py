"""What `coterie report` decides: the best result within a budget of bytes, and those that nothing beats in both.

Light to import: reading a budget needs neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

from coterie.errors import CoterieError
from coterie.pages.page import sized

if TYPE_CHECKING:
    from coterie.judge.lineup import Comparison, Measured


class Step(TypedDict):
    """What is best from so many bytes on, up to those of the next step."""

    bytes: int
    best: str | None
    sentence: str


class Verdict(TypedDict):
    """budget: as asked, else the bytes of the largest result that is smaller than the original.
    best, sentence: of the step that it falls into. front: the models than which no other is both smaller and better,
    smallest first.
    """

    budget: int
    best: str | None
    sentence: str
    front: list[str]
    steps: list[Step]


def read_budget(asked: str | int | None) -> int | None:
    """Bytes, from their number or from text as in 20GB (1000 to a step) or 20GiB (1024). Raises: CoterieError."""
    if asked is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", str(asked).strip(), re.IGNORECASE)
    if found is None:
        raise CoterieError(f"--budget {asked!r:.60}: expected bytes, as in 20GB or 1.5TB")
    number, letter, binary = found.groups()
    return round(float(number) * (1024 if binary else 1000) ** " kmgt".index(letter.lower() or " "))


def score(model: Measured, of: str = "value") -> float:
    """Higher is better: the change of log-likelihood, mean over data sets; without texts, exact match.

    of: "value", or the "low" or "high" end of its interval.
    """
    if model["mean"] is None:
        return exact(model, of) or 0.0
    change = model["paired"].get("mean") if "paired" in model else None
    return change[of] if change else 0.0


def exact(model: Measured, of: str = "value") -> float | None:
    """Exact match, mean over data sets."""
    shares = [match[of] for match in model["exact_match"].values()]
    return sum(shares) / len(shares) if shares else None


def front(models: Sequence[Measured], scores: Sequence[float]) -> list[str]:
    """Names of the models than which no other is as small and better, or smaller and as good; smallest first."""
    order = sorted(zip(models, scores, strict=True), key=lambda pair: (pair[0]["bytes"], -pair[1]))
    found, best = [], float("-inf")
    for model, value in order:
        if value > best:
            found.append(model["name"])
            best = value
    return found


def decide(found: Comparison, budget: int | None) -> Verdict:
    """The best of the models by `score`, the smaller of two that are as good, within a budget and for every other."""
    models, (original, *made) = found["models"], found["models"]
    names = front(models, [score(m) for m in models])
    smallest = min(models, key=lambda m: m["bytes"])
    nothing = f"nothing fits: {smallest['name']} is the smallest that was measured, with {sized(smallest['bytes'])}."
    steps: list[Step] = [{"bytes": 0, "best": None, "sentence": nothing}]
    for size in sorted({m["bytes"] for m in models}):
        fits = [m for m in models if m["bytes"] <= size]
        best = next(m for name in reversed(names) for m in fits if m["name"] == name)
        sentence = _sentence(best, original, fits, found["references"])
        steps.append({"bytes": size, "best": best["name"], "sentence": sentence})
    smaller = [m["bytes"] for m in made if m["bytes"] < original["bytes"]]
    line = budget if budget is not None else max(smaller, default=original["bytes"])
    step = [s for s in steps if s["bytes"] <= line][-1]
    return {"budget": line, "best": step["best"], "sentence": step["sentence"], "front": names, "steps": steps}


def _sentence(best: Measured, original: Measured, fits: Sequence[Measured], references: Sequence[Measured]) -> str:
    """The best and its numbers; who clearly answers more, and the reference where it is smaller and clearly better."""
    if best is original:
        return f"{original['name']}, the original, fits, and nothing smaller is as good."
    share = 100 * best["bytes"] / original["bytes"]
    said = [f"{best['name']} is best: {sized(best['bytes'])}, {share:.0f} % of the original"]
    if best["mean"] is not None:
        said.append(f"{score(best):+.4f} nats of log-likelihood per token")
    if (share_right := exact(best)) is not None:
        said.append(f"exact match {100 * share_right:.1f} % (original {100 * (exact(original) or 0):.1f} %)")
    text = ", ".join(said) + "."
    right = max(fits, key=lambda m: exact(m) or 0.0)
    if (exact(right, "low") or 0.0) > (share_right or 0.0):
        text += f" {right['name']} answers more: exact match {100 * (exact(right) or 0):.1f} %."
    for reference in references:
        if reference["bytes"] < best["bytes"] and score(reference) > score(best, "high"):
            text += f" {reference['name']} would be smaller and better: {reference['makes']}"
    return text
