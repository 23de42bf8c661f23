"""What the numbers of `coterie analyze` say to somebody who wants a smaller model: sentences, each with its numbers.

Thresholds are conventions, named in the sentences; none of them replaces an evaluation of the compressed model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coterie.judge.numbers import Found, Layers, at, correlation, mean_at, number, pairs
from coterie.judge.rounding import LEVELS
from coterie.methods.prune.stun import dendrogram

ALIKE = 0.9  # cosine of outputs above which one expert may stand for another
SMALL = 0.01  # share of the hidden states' energy: a layer below loses little when condensed
TOLERATED = 0.2  # error of a layer's weighted sum, norm over norm
NAMED = 5  # layers named in a sentence
CLEAR = 0.05  # of the energy above chance: below it a barycentre is not worth its bytes


@dataclass(frozen=True)
class Advice:
    """Sentences about one thing that can be done, and the numbers that they rest on."""

    about: str
    text: str
    numbers: Found


def redundancy(outputs: np.ndarray, router: np.ndarray) -> dict[str, float | None]:
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


def advise(layers: Layers) -> list[Advice]:
    """Sentences on all layers, the most useful first."""
    makers = (_stun, _condense, _merge, _bits, _offload, _routing, _load)
    return [advice for make in makers if (advice := make(layers))]


def _stun(layers: Layers) -> Advice:
    spare = _by_layer(layers, "redundancy spare")
    best = sorted((e for e in layers if at(e, "redundancy spare")), key=lambda e: -at(e, "redundancy spare"))
    router = mean_at(layers, "redundancy router")
    if best:
        named = "; ".join(
            f"layer {e['layer']}: {_count(at(e, 'redundancy pairs'), 'pair')} of experts with output cosine of {ALIKE} "
            f"or more, STUN can drop {at(e, 'redundancy spare')} of {e['num_experts']}"
            for e in best[:NAMED]
        )
        text = f"Redundant experts in {len(best)} of {len(layers)} layers. {named}."
    else:
        most = max((m for m in _by_layer(layers, "redundancy most").values() if m is not None), default=None)
        text = f"No two experts of a layer put out nearly the same (cosine of {ALIKE} or more on the same tokens)"
        text += "." if most is None else f"; the most alike pair has {most:.2f}."
        text += " Whatever pruning removes is not spare: measure what it costs."
    if router is not None:
        text += (
            f" Over pairs, router rows, which is all that STUN reads, correlate with outputs by {router:.2f}: they are "
            + ("a fair guide." if router >= 0.5 else "a weak guide, so give it statistics or compare criteria.")
        )
    return Advice("stun", text, {"spare": spare, "router": router})


def _condense(layers: Layers) -> Advice:
    order = sorted(layers, key=lambda e: at(e, "condense lost"))
    easy = [entry for entry in order if at(entry, "condense lost") <= SMALL]
    named = "; ".join(
        f"layer {e['layer']} loses {_percent(at(e, 'condense lost'))} "
        f"(its experts give {_percent(at(e, 'condense routed'))}; of that captured: "
        f"{_percent(at(e, 'condense captured'))})"
        for e in (easy or order)[:NAMED]
    )
    beginning = f"{_count(len(easy), 'layer')} of {len(layers)}" if easy else "No layer"
    text = (
        f"{beginning} can be condensed at {_percent(SMALL)} or less of the energy of the hidden states that leave it, "
        f"with {_count(at(layers[0], 'chosen'), 'expert')} always on. "
        f"{'They are' if easy else 'The easiest'}: {named}."
    )
    numbers = {"lost": _by_layer(layers, "condense lost"), "easy": [entry["layer"] for entry in easy]}
    return Advice("condense", text, numbers)


def _merge(layers: Layers) -> Advice | None:
    some = [entry for entry in layers if entry["energy"]]
    if not some:
        return None
    gains = {str(e["layer"]): number(at(e, "energy aligned") - at(e, "energy chance")) for e in some}
    worth = [layer for layer, gain in gains.items() if gain is not None and gain >= CLEAR]
    paths = ("aligned", "chance", "ranks 0.25 aligned", "ranks 0.25 alone")
    aligned, chance, both, alone = (_percent(mean_at(some, f"energy {path}") or 0.0) for path in paths)
    text = (
        f"A barycentre of a layer's experts captures {aligned} of their energy after alignment, where random experts "
        f"of the same shape give {chance}; with factors of a quarter of the numbers, {both}, and such factors alone "
        f"{alone}. "
    )
    if worth:
        text += f"It is worth trying in {_count(len(worth), 'layer')}: {_named(worth)}."
    else:
        text += "Experts share nothing that it could hold: merging and residual coding would lose what they differ in."
    return Advice("barycentre", text, {"above_chance": gains, "worth": worth})


def _bits(layers: Layers) -> Advice:
    known = [int(bits) for bits in at(layers[0], "bits")]
    fewest = {
        str(entry["layer"]): min((b for b in known if at(entry, f"bits {b} layer") <= TOLERATED), default=None)
        for entry in layers
    }
    errors = {str(bits): mean_at(layers, f"bits {bits} layer") for bits in known}
    shown = ", ".join(f"{error:.3f} at {bits}" for bits, error in errors.items() if error is not None)
    by_bits = {b: [*fewest.values()].count(b) for b in sorted(set(fewest.values()), key=lambda b: b or 99)}
    named = "; ".join(f"{b or 'more than 8'} bits in {_count(count, 'layer')}" for b, count in by_bits.items())
    text = (
        f"Rounded to the nearest of {LEVELS}, experts change their layer's sum by {shown} bits (norm over norm, mean "
        f"of layers). Within an error of {TOLERATED} stay {named}. Errors add up over layers, and "
        "better rounding lowers them."
    )
    return Advice("bits", text, {"fewest": fewest, "error": errors})


def _offload(layers: Layers) -> Advice:
    repeat, chance = mean_at(layers, "locality repeat"), mean_at(layers, "locality chance")
    lru, hot, uniform = (mean_at(layers, f"locality cache {name}") for name in ("lru", "hot", "uniform"))
    gate = mean_at(layers, "norms gate_contribution")
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
    return Advice("offloading", text.strip(), numbers)


def _routing(layers: Layers) -> Advice | None:
    words = {
        "next": "the next best experts",
        "random": "random ones",
        "first": "the first expert alone",
        "all": "all experts by their logits",
    }
    errors = {name: mean_at(layers, f"probe counterfactual {name} error") for name in words}
    shown = [f"{words[name]} {error:.2f}" for name, error in errors.items() if error is not None]
    if not shown:
        return None
    text = (
        "Had others run on the same tokens, the error of the experts' sum (1: as if it were gone) would be: "
        f"{', '.join(shown)}."
    )
    best, drawn = errors["next"], errors["random"]
    if best is not None:
        near = drawn is not None and best < 0.5 * drawn
        text += " The next best can stand in for missing ones." if near else " Missing experts have no stand-in."
    return Advice("routing", text, errors)


def _load(layers: Layers) -> Advice:
    unused = {layer: count for layer, count in _by_layer(layers, "load unused").items() if count}
    entropy, gap = mean_at(layers, "load entropy"), mean_at(layers, "load domain_gap")
    text = f"Load has {entropy:.2f} of the entropy of an even one."
    if unused:
        text += (
            f" In {_count(len(unused), 'layer')}, {_count(sum(unused.values()), 'expert')} no token of this data chose."
        )
    if gap is not None:
        text += f" Between two domains {_percent(gap)} of the choices go to other experts: " + (
            "what data you calibrate on decides what looks spare." if gap >= 0.2 else "domains share experts."
        )
    return Advice("load", text, {"entropy": entropy, "unused": unused, "domain_gap": gap})


def _by_layer(layers: Layers, path: str) -> dict[str, float]:
    return {str(entry["layer"]): at(entry, path) for entry in layers}


def _count(n: float, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def _named(keys: list[str]) -> str:
    return ", ".join(keys[:NAMED]) + (", ..." if len(keys) > NAMED else "")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
