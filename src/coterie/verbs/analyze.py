"""How the experts of a model really behave: likeness, norms, routing, and advice. Changes nothing.

Example: coterie analyze MODEL --data prose=prose.txt -o analysis.html
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from coterie.forward.samples import Calibration, Dtype, compute_dtype, read_samples
from coterie.model.experts import Experts, expert_shapes, read_layer
from coterie.model.layer import Model
from coterie.options import Help, ModelPath, public
from coterie.pages.terminal import Asked, paragraphs
from coterie.storage.files import check_new_file, write_whole
from coterie.storage.record import Progress, Stopwatch, no_progress, versions

if TYPE_CHECKING:
    from coterie.model.layer import MoE


# First weights and routers are compared, from disk (`judge/similarity.py`, `judge/alignment.py`); then one streaming
# forward looks at outputs and routing (`judge/probe.py`); sentences are made of both (`judge/advice.py`), and a page of
# all (`pages/analysis.py`).
@public
def analyze(
    model: ModelPath,
    *,
    out: Annotated[
        str | Path | None,
        Help("Write a page that needs nothing else.", "FILE.html", flags=("--output", "-o"), given=Path),
    ] = None,
    calibration: Calibration,
    dtype: Dtype = "auto",
    overwrite: Annotated[bool, Help("Replace FILE.html.")] = False,
    on_progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measures the experts of every MoE layer; with `out`, also writes a page of HTML that needs nothing else.

    data, samples, seq_len, seed, dtype: as in `collect`; the seed also draws random experts.
    Returns `{"model", "options", "domains", "layers", "advice", "notes", "versions", "seconds", "peak_rss_bytes"}`.
    "advice" is a list of {"about", "text", "numbers"}. "layers" is a list, in order; None stands for what could not be
    measured. E experts, K chosen per token; each entry holds

    - "layer", "num_experts", "chosen": the layer's key, E, K.
    - "cosine": (E, E) matrices: "weights" (all matrices of an expert, flattened), "gate", "up", "down" (each alone),
      "router" (rows), "outputs" (mean over the probed tokens of the cosine of both experts' outputs of one token),
      "angular" (the same of 1 - arccos / pi).
    - "router": "r2" by part: how much of the similarity of router rows that of mean neurons explains.
    - "redundancy": "pairs" and "spare" experts of output cosine 0.9 or more, "most", and "router" (r with outputs).
    - "alignment": the "experts" compared (all, unless they are large), "cosine" and "kendall" between them with neurons
      in the best order, their "mean", the "chance" of random experts, and pairs "alike" with their "permutation":
      neuron permutation[i] of the second stands for neuron i of the first.
    - "energy": the share of the experts' squared norm that one mean expert captures: "raw", "aligned", by "chance" of
      random experts, and "none" (1 / number of experts); "ranks" by share of stored numbers: with low-rank residuals
      ("aligned"), and low rank "alone".
    - "probe": the two-pass probe on "tokens" of them: "outputs_mean" cosine, and "counterfactual" by choice of others
      ("next", "random", "first", "all"): "error" (1: as if the sum were gone) and "cosine" with the true sum.
    - "norms": "mean" by expert on the same tokens; Pearson's r of gate and norm of the chosen ("gate_norm"), of gate
      and gate times norm ("gate_contribution"), of softmax score and norm over all experts ("score_norm"); the share of
      chosen experts among the K of largest norm ("chosen_largest", by "chance" K / E); "points" [gate, norm].
    - "bits": by number of bits, round-to-nearest on even levels from the lowest to the highest weight of each group of
      64 (the reference of `report` is symmetric): "stored" bits per weight, relative error of "weights", of the
      "layer"'s sum, and of each of the "experts" on the probed tokens.
    - "condense": the K "experts" and "gates" that, always on, come nearest to the routed sum; the share "captured" of
      it, its energy in that of the hidden states that leave the layer ("routed"), and what is "lost" of those.
    - "load": shares of choices by domain ("domains") and "all"; "entropy" (1: even), "unused", "largest", "domain_gap".
    - "locality": "repeat" of a token's experts by the next token, by "chance" and "uniform"; "cache" hit rates.
    - "coactivation": tokens that chose both, (E, E); "coactive": the pairs chosen together most, with lift.

    Raises: CoterieError, before anything is written.
    """
    clock = Stopwatch()
    if out is not None:
        check_new_file(Path(out), overwrite)
    source = Model.open(model)
    chosen = compute_dtype(source, dtype)
    by_domain, notes = read_samples(source, calibration)
    spill = None if out is None else Path(out).parent
    layers = _measure(source, by_domain, chosen, calibration.seed, on_progress, spill)
    from coterie.judge.advice import advise

    result = {
        "model": {"path": str(model), "hash": source.checkpoint.hash, "family": source.family.name},
        "options": calibration.sizes | {"dtype": str(chosen).removeprefix("torch.")},
        "domains": {name: {"samples": len(given), "tokens": sum(map(len, given))} for name, given in by_domain.items()},
        "layers": layers,
        "advice": advise(layers, layers[0]["chosen"]),
        "notes": [*notes, *_notes(source, layers)],
        "versions": versions(),
        **clock.read(),
    }
    if out is not None:
        from coterie.pages.analysis import shown

        write_whole(Path(out), lambda partial: partial.write_text(shown(result), encoding="utf-8"))
    return result


def _measure(
    source: Model,
    by_domain: dict[str, list[tuple[int, ...]]],
    dtype: Any,
    seed: int,
    on_progress: Progress,
    spill: Path | None,
) -> list[dict[str, Any]]:
    """The entries of all MoE layers. The forward comes first: what it refuses is known before weights are compared."""
    import numpy as np

    from coterie.judge.advice import redundancy
    from coterie.judge.probe import probe

    found = list(probe(source, by_domain, dtype, seed=seed, on_progress=on_progress, spill=spill))
    layers = []
    for done, (block, entry) in enumerate(found):
        static = _weights(source, block, seed)
        cosines = static.pop("cosine") | entry.pop("cosine")
        outputs, router = (np.array(cosines[name]) for name in ("outputs", "router"))
        head = {"layer": block.key, "num_experts": block.num_experts, "chosen": entry.pop("chosen")}
        alike = {"redundancy": redundancy(outputs, router)}
        layers.append({**head, "cosine": cosines, **static, **alike, **entry})
        on_progress("comparing weights", done + 1, len(found))
    return layers


def _weights(source: Model, block: MoE, seed: int) -> dict[str, Any]:
    """What needs no forward."""
    from coterie.judge import alignment
    from coterie.judge.numbers import listed, number
    from coterie.judge.similarity import compare_router, compare_weights

    experts, shapes = Experts(source.checkpoint, block), expert_shapes(source.checkpoint, block)
    weights = compare_weights(experts)
    rows, r2 = compare_router(read_layer(source.checkpoint, block), weights.means)
    aligned = alignment.look(experts, (shapes["up"][0], len(shapes) * shapes["up"][1]), seed)
    return {
        "cosine": {name: listed(values) for name, values in {**weights.cosines, "router": rows}.items()},
        "router": {"r2": {part: number(value) for part, value in r2.items()}},
        "alignment": aligned[0] if aligned else None,
        "energy": aligned[1] if aligned else None,
    }


def _notes(source: Model, layers: list[dict[str, Any]]) -> list[str]:
    """What was left out, and what was done on less than all."""
    notes = []
    if len(source.main) < len(source.moe):
        notes.append("multi-token-prediction layers and attention experts are not analyzed")
    probed = max(entry["probe"]["tokens"] for entry in layers)
    notes.append(f"outputs of all experts are compared on {probed:,} tokens per layer, spread evenly over all")
    if any(entry["alignment"] is None for entry in layers):
        notes.append("experts are too large, or alone, so their neurons were not aligned: no barycentre is measured")
    elif any(len(entry["alignment"]["experts"]) < entry["num_experts"] for entry in layers):
        some = min(len(entry["alignment"]["experts"]) for entry in layers)
        notes.append(f"neurons are aligned between {some} experts of a layer, not all: more would take too long")
    if any(entry["norms"]["score_norm"] is None for entry in layers):
        notes.append("some routers' logits could not be seen: what needs scores of experts not chosen is left out")
    return notes


def show(found: Mapping[str, Any], asked: Asked) -> Iterator[str]:
    """The advice."""
    yield f"{asked['out'] or asked['model']}: done in {found['seconds']:.1f} s"
    yield from paragraphs([(advice["about"], advice["text"]) for advice in found["advice"]])
