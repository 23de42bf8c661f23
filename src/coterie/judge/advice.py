"""What the numbers of `coterie analyze` say to somebody who wants a smaller model: verdicts, each with its numbers and
the command to run next.

Thresholds are conventions, named in the sentences; none of them replaces an evaluation of the compressed model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coterie.judge.commands import STATS, Commands
from coterie.judge.numbers import Found, Layers, at, correlation, mean_at, number, pairs
from coterie.judge.rounding import LEVELS
from coterie.methods.prune.stun import dendrogram

ALIKE = 0.9  # cosine of outputs above which one expert may stand for another
SMALL = 0.01  # share of the hidden states' energy: a layer below loses little when condensed
TOLERATED = 0.2  # error of a layer's weighted sum, norm over norm
NAMED = 5  # layers named in a sentence
TRIED = 0.125  # share of the experts that a first trial removes
CLEAR = 0.05  # of the energy above chance: below it a barycentre is not worth its bytes


@dataclass(frozen=True)
class Advice:
    """What is said about one thing that can be done.

    number: the one that the verdict rests on, in words. text: all that was found. numbers: what it rests on. command:
    what to run next, ready to be pasted; a comment of the shell where there is nothing to run.
    """

    about: str
    verdict: str
    number: str
    text: str
    numbers: Found
    command: str


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


def advise(layers: Layers, commands: Commands) -> list[Advice]:
    """What is said on all layers, the most useful first."""
    makers = (_stun, _condense, _merge, _bits, _offload, _routing, _load)
    return [advice for make in makers if (advice := make(layers, commands))]


def _stun(layers: Layers, commands: Commands) -> Advice:
    spare = _by_layer(layers, "redundancy spare")
    best = sorted((e for e in layers if at(e, "redundancy spare")), key=lambda e: -at(e, "redundancy spare"))
    router = mean_at(layers, "redundancy router")
    if best:
        named = "; ".join(
            f"layer {e['layer']}: {_count(at(e, 'redundancy pairs'), 'pair')} of experts with output cosine of {ALIKE} "
            f"or more, STUN can drop {at(e, 'redundancy spare')} of {e['num_experts']}"
            for e in best[:NAMED]
        )
        verdict = f"Redundant experts in {len(best)} of {len(layers)} layers"
        text, total = f"{verdict}. {named}.", sum(spare.values())
        share = total / sum(int(at(entry, "num_experts")) for entry in layers)
        figure = f"{total:,} experts can go, {_percent(share)} of all"
        command = commands.line("prune", "pruned", "--method", "stun", "--budget", "global", "--ratio", f"{share:.3g}")
    else:
        most = max((m for m in _by_layer(layers, "redundancy most").values() if m is not None), default=None)
        verdict = "No expert is spare: whatever is removed has a cost to be measured"
        figure = (
            "no pair to compare" if most is None else f"the most alike pair has a cosine of {most:.2f}, not {ALIKE}"
        )
        command = commands.with_stats("prune", "--method", "reap", "--ratio", TRIED)
        text = f"No two experts of a layer put out nearly the same (cosine of {ALIKE} or more on the same tokens)"
        text += "." if most is None else f"; the most alike pair has {most:.2f}."
        text += " Whatever pruning removes is not spare: measure what it costs."
    if router is not None:
        text += (
            f" Over pairs, router rows, which is all that STUN reads, correlate with outputs by {router:.2f}: they are "
            + ("a fair guide." if router >= 0.5 else "a weak guide, so give it statistics or compare criteria.")
        )
    return Advice("stun", verdict, figure, text, {"spare": spare, "router": router}, command)


def _condense(layers: Layers, commands: Commands) -> Advice:
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
    verdict = f"{beginning} can be condensed" + ("" if easy else " cheaply")
    figure = f"layer {order[0]['layer']} would lose {_percent(at(order[0], 'condense lost'))}, limit {_percent(SMALL)}"
    ids = ",".join(str(entry["layer"]) for entry in easy or order[:1])
    return Advice(
        "condense", verdict, figure, text, numbers,
        commands.line("condense", "condensed", "--layer-ids", ids, data=True),
    )  # fmt: skip


def _merge(layers: Layers, commands: Commands) -> Advice | None:
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
    figure = f"{aligned} of their energy, by chance {chance}"
    if worth:
        verdict = f"Experts share something in {_count(len(worth), 'layer')}: merging is worth a trial"
        command = commands.line("merge", "merged", "--align", "--ratio", TRIED, data=True)
        text += f"It is worth trying in {_count(len(worth), 'layer')}: {_named(worth)}."
    else:
        verdict = "Experts share nothing that an average could hold"
        command = "# nothing to run: merging would lose what they differ in"
        text += "Experts share nothing that it could hold: merging and residual coding would lose what they differ in."
    return Advice("barycentre", verdict, figure, text, {"above_chance": gains, "worth": worth}, command)


def _bits(layers: Layers, commands: Commands) -> Advice:
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
    enough = max((bits or max(known) for bits in fewest.values()), default=max(known))
    verdict = f"{enough} bits are enough for every layer"
    if None in fewest.values():
        verdict = f"Not even {enough} bits are enough for every layer"
    figure = f"mean error of a layer's sum {errors[str(enough)] or 0:.3f} at {enough} bits, limit {TOLERATED}"
    command = commands.line("quantize", "quantised", "--bits", enough)
    return Advice("bits", verdict, figure, text, {"fewest": fewest, "error": errors}, command)


def _offload(layers: Layers, commands: Commands) -> Advice:
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
    found = lru is not None and hot is not None and uniform is not None
    verdict = "How often a cache of experts hits was not measured"
    if lru is not None and hot is not None:
        verdict = f"A cache does better with {'the most recent' if lru > hot else 'the hottest'} experts"
    figure = f"hits {_percent(max(lru or 0, hot or 0))} with {_percent(uniform or 0)} of the experts" if found else "–"
    command = "# nothing to run: coterie places no experts; the numbers are for who serves the model"
    return Advice("offloading", verdict, figure, text.strip(), numbers, command)


def _routing(layers: Layers, commands: Commands) -> Advice | None:
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
    near = best is not None and drawn is not None and best < 0.5 * drawn
    verdict = "The next best can stand in for missing ones" if near else "Missing experts have no stand-in"
    if best is not None:
        text += f" {verdict}."
    command = commands.with_stats("compare", "--ratio", TRIED)
    return Advice("routing", verdict, f"error of the sum: {shown[0]}; 1: as if it were gone", text, errors, command)


def _load(layers: Layers, commands: Commands) -> Advice:
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
    verdict, command = "Experts share the work evenly", commands.line("collect", STATS, data=True)
    if gap is not None and gap >= 0.2:
        verdict = "Domains use different experts: calibrate on all that you need"
    if unused:
        verdict = f"{_count(sum(unused.values()), 'expert')} never used"
        share = sum(unused.values()) / sum(int(at(entry, "num_experts")) for entry in layers)
        command = commands.with_stats("prune", "--method", "frequency", "--ratio", f"{share:.3g}")
    figure = f"entropy {entropy:.2f} of an even load"
    if gap is not None:
        figure += f"; {_percent(gap)} of the choices differ between two domains"
    numbers = {"entropy": entropy, "unused": unused, "domain_gap": gap}
    return Advice("load", verdict, figure, text, numbers, command)


def _by_layer(layers: Layers, path: str) -> dict[str, float]:
    return {str(entry["layer"]): at(entry, path) for entry in layers}


def _count(n: float, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def _named(keys: list[str]) -> str:
    return ", ".join(keys[:NAMED]) + (", ..." if len(keys) > NAMED else "")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
