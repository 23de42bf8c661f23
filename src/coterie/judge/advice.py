"""What the numbers of `coterie analyze` say to somebody who wants a smaller model: sentences, each with its numbers.

Thresholds are conventions, named in the sentences; none of them replaces an evaluation of the compressed model.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from coterie.judge.rounding import LEVELS
from coterie.judge.numbers import correlation, number, pairs
from coterie.methods.prune.stun import dendrogram

ALIKE = 0.9  # cosine of outputs above which one expert may stand for another
SMALL = 0.01  # share of the hidden states' energy: a layer below loses little when condensed
TOLERATED = 0.2  # error of a layer's weighted sum, norm over norm
NAMED = 5  # layers named in a sentence
CLEAR = 0.05  # of the energy above chance: below it a barycentre is not worth its bytes

Layers = list[dict[str, Any]]
Advice = dict[str, Any]  # {"about", "text", "numbers"}


def redundancy(outputs: np.ndarray, router: np.ndarray) -> dict[str, Any]:
    """What a layer's similarities (E, E) leave to STUN.

    pairs: of output cosine `ALIKE` or more; spare: experts beyond one of each cluster in which all pairs are so alike
    (complete linkage); router: Pearson's r over pairs of router-row and output cosines, STUN reading rows alone.
    """
    heights = dendrogram(1.0 - outputs).heights
    values = pairs(outputs)
    return {
        "pairs": int((values >= ALIKE).sum()),
        "spare": sum(height <= 1.0 - ALIKE + 1e-9 for height in heights),
        "most": number(values.max()) if len(values) else None,
        "router": number(correlation(pairs(router), values)),
    }


def advise(layers: Layers, top_k: int) -> list[Advice]:
    """Sentences on all layers, the most useful first."""
    found = [
        _stun(layers),
        _condense(layers, top_k),
        _merge(layers),
        _bits(layers),
        _offload(layers),
        _routing(layers),
        _load(layers),
    ]
    return [advice for advice in found if advice]


def _stun(layers: Layers) -> Advice:
    spare = {entry["layer"]: entry["redundancy"]["spare"] for entry in layers}
    best = sorted((e for e in layers if e["redundancy"]["spare"]), key=lambda e: -e["redundancy"]["spare"])[:NAMED]
    router = _mean([entry["redundancy"]["router"] for entry in layers])
    if best:
        named = "; ".join(
            f"layer {e['layer']}: {_count(e['redundancy']['pairs'], 'pair')} of experts with output cosine of {ALIKE} "
            f"or more, STUN can drop {e['redundancy']['spare']} of {e['num_experts']}"
            for e in best
        )
        text = f"Redundant experts in {len([s for s in spare.values() if s])} of {len(layers)} layers. {named}."
    else:
        most = max((e["redundancy"]["most"] for e in layers if e["redundancy"]["most"] is not None), default=None)
        text = f"No two experts of a layer put out nearly the same (cosine of {ALIKE} or more on the same tokens)"
        text += "." if most is None else f"; the most alike pair has {most:.2f}."
        text += " Whatever pruning removes is not spare: measure what it costs."
    if router is not None:
        text += (
            f" Over pairs, router rows, which is all that STUN reads, correlate with outputs by {router:.2f}: they are "
            + ("a fair guide." if router >= 0.5 else "a weak guide, so give it statistics or compare criteria.")
        )
    return {"about": "stun", "text": text, "numbers": {"spare": spare, "router": router}}


def _condense(layers: Layers, top_k: int) -> Advice:
    lost = {entry["layer"]: entry["condense"]["lost"] for entry in layers}
    order = sorted(layers, key=lambda e: e["condense"]["lost"])
    easy = [entry for entry in order if entry["condense"]["lost"] <= SMALL]
    named = "; ".join(
        f"layer {e['layer']} loses {_percent(e['condense']['lost'])} "
        f"(its experts give {_percent(e['condense']['routed'])}; of that captured: "
        f"{_percent(e['condense']['captured'])})"
        for e in (easy or order)[:NAMED]
    )
    beginning = (
        f"{_count(len(easy), 'layer')} of {len(layers)} can be condensed at {_percent(SMALL)} or less"
        if easy
        else f"No layer can be condensed at {_percent(SMALL)} or less"
    )
    text = (
        f"{beginning} of the energy of the hidden states that leave it, with {_count(top_k, 'expert')} always on. "
        f"{'They are' if easy else 'The easiest'}: {named}."
    )
    numbers = {"lost": lost, "easy": [entry["layer"] for entry in easy]}
    return {"about": "condense", "text": text, "numbers": numbers}


def _merge(layers: Layers) -> Advice | None:
    some = [entry for entry in layers if entry["energy"]]
    if not some:
        return None
    gains = {e["layer"]: number(e["energy"]["aligned"] - e["energy"]["chance"]) for e in some}
    aligned, chance = (_mean([e["energy"][name] for e in some]) or 0.0 for name in ("aligned", "chance"))
    worth = [layer for layer, gain in gains.items() if gain is not None and gain >= CLEAR]
    low = "0.25"
    both, alone = (_mean([e["energy"]["ranks"][low][name] for e in some]) or 0.0 for name in ("aligned", "alone"))
    text = (
        f"A barycentre of a layer's experts captures {_percent(aligned)} of their energy after alignment, where random "
        f"experts of the same shape give {_percent(chance)}; with factors of a quarter of the numbers, "
        f"{_percent(both)}, and such factors alone {_percent(alone)}. "
    )
    if worth:
        text += f"It is worth trying in {_count(len(worth), 'layer')}: {_named(worth)}."
    else:
        text += "Experts share nothing that it could hold: merging and residual coding would lose what they differ in."
    return {"about": "barycentre", "text": text, "numbers": {"above_chance": gains, "worth": worth}}


def _bits(layers: Layers) -> Advice:
    fewest: dict[str, int | None] = {}
    for entry in layers:
        enough = [int(bits) for bits, found in entry["bits"].items() if found["layer"] <= TOLERATED]
        fewest[entry["layer"]] = min(enough, default=None)
    errors = {bits: _mean([entry["bits"][bits]["layer"] for entry in layers]) for bits in layers[0]["bits"]}
    shown = ", ".join(f"{error:.3f} at {bits}" for bits, error in errors.items() if error is not None)
    by_bits = {b: [key for key, fewest_bits in fewest.items() if fewest_bits == b] for b in fewest.values()}
    order = sorted(by_bits.items(), key=lambda item: item[0] or 99)
    named = "; ".join(f"{b or 'more than 8'} bits in {_count(len(keys), 'layer')}" for b, keys in order)
    text = (
        f"Rounded to the nearest of {LEVELS}, experts change their layer's sum by {shown} bits (norm over norm, mean "
        f"of layers). Within an error of {TOLERATED} stay {named}. Errors add up over layers, and "
        "better rounding lowers them."
    )
    return {"about": "bits", "text": text, "numbers": {"fewest": fewest, "error": errors}}


def _offload(layers: Layers) -> Advice:
    def of(*path: str) -> float | None:
        return _mean([_at(entry, path) for entry in layers])

    repeat, chance = of("locality", "repeat"), of("locality", "chance")
    lru, hot, uniform = (of("locality", "cache", name) for name in ("lru", "hot", "uniform"))
    gate = of("norms", "gate_contribution")
    numbers = {"repeat": repeat, "chance": chance, "lru": lru, "hot": hot, "uniform": uniform, "gate": gate}
    text = ""
    if repeat is not None and chance is not None:
        again = f"{_percent(repeat)} of cases (by chance {_percent(chance)})"
        text += f"A token's expert is chosen again by the next token in {again}. "
    if lru is not None and hot is not None and uniform is not None:
        better = "recent use is the better guide" if lru > hot else "fixed hot experts are the better guide"
        text += (
            f"A cache of {_percent(uniform)} of the experts hits {_percent(lru)} of requests with the most recent ones "
            f"and {_percent(hot)} with the hottest: {better}. "
        )
    if gate is not None:
        fair = "says" if gate >= 0.8 else "says only in part"
        text += (
            f"The gate {fair} how much an expert contributes (correlation {gate:.2f}), by which its precision could be "
            "chosen."
        )
    return {"about": "offloading", "text": text.strip(), "numbers": numbers}


def _routing(layers: Layers) -> Advice | None:
    errors = {
        name: _mean([_at(entry, ("probe", "counterfactual", name, "error")) for entry in layers])
        for name in ("next", "random", "first", "all")
    }
    words = {
        "next": "the next best experts",
        "random": "random ones",
        "first": "the first expert alone",
        "all": "all experts by their logits",
    }
    shown = [f"{words[name]} {error:.2f}" for name, error in errors.items() if error is not None]
    if not shown:
        return None
    text = (
        "Had others run on the same tokens, the error of the experts' sum (1: as if it were gone) would be: "
        f"{', '.join(shown)}."
    )
    near = errors["next"] is not None and errors["random"] is not None and errors["next"] < 0.5 * errors["random"]
    if errors["next"] is not None:
        text += " The next best can stand in for missing ones." if near else " Missing experts have no stand-in."
    return {"about": "routing", "text": text, "numbers": errors}


def _load(layers: Layers) -> Advice:
    unused = {entry["layer"]: entry["load"]["unused"] for entry in layers if entry["load"]["unused"]}
    entropy, gap = (_mean([entry["load"][name] for entry in layers]) for name in ("entropy", "domain_gap"))
    text = f"Load has {entropy:.2f} of the entropy of an even one."
    if unused:
        text += (
            f" In {_count(len(unused), 'layer')}, {_count(sum(unused.values()), 'expert')} no token of this data chose."
        )
    if gap is not None:
        text += f" Between two domains {_percent(gap)} of the choices go to other experts: " + (
            "what data you calibrate on decides what looks spare." if gap >= 0.2 else "domains share experts."
        )
    return {"about": "load", "text": text, "numbers": {"entropy": entropy, "unused": unused, "domain_gap": gap}}


def _at(entry: dict[str, Any], path: tuple[str, ...]) -> Any:
    found: Any = entry
    for name in path:
        found = None if found is None else found[name]
    return found


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return number(sum(known) / len(known)) if known else None


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def _named(keys: list[str]) -> str:
    return ", ".join(keys[:NAMED]) + (", ..." if len(keys) > NAMED else "")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
