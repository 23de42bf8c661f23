"""How the experts of a model really behave: likeness, norms, routing, and advice. Changes nothing.

Example: coterie analyze MODEL --data prose=prose.txt -o analysis.html
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from coterie.forward.samples import Calibration, Dtype, compute_dtype, counted, dtype_name, read_samples
from coterie.model.layer import Model
from coterie.model.layered import check_single
from coterie.options import Help, ModelPath, public
from coterie.pages.terminal import Asked, paragraphs
from coterie.storage.files import check_new_file, write_whole
from coterie.storage.record import Progress, Stopwatch, no_progress, versions


# `judge/analysis.py` measures; sentences are made of its numbers (`judge/advice.py`), and a page (`pages/analysis.py`).
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
    check_single(source)
    chosen = compute_dtype(source, dtype)
    by_domain, notes = read_samples(source, calibration)
    spill = None if out is None else Path(out).parent
    from coterie.judge.advice import advise
    from coterie.judge.analysis import limits, measure

    layers = measure(source, by_domain, chosen, calibration.seed, on_progress, spill)
    result = {
        "model": {"path": str(model), "hash": source.checkpoint.hash, "family": source.family.name},
        "options": calibration.sizes | {"dtype": dtype_name(chosen)},
        "domains": counted(by_domain),
        "layers": layers,
        "advice": [vars(advice) for advice in advise(layers)],
        "notes": [*notes, *limits(source, layers)],
        "versions": versions(),
        **clock.read(),
    }
    if out is not None:
        from coterie.pages.analysis import shown

        write_whole(Path(out), lambda partial: partial.write_text(shown(result), encoding="utf-8"))
    return result


def show(found: dict[str, Any], asked: Asked) -> Iterator[str]:
    """The advice."""
    yield f"{asked['out'] or asked['model']}: done in {found['seconds']:.1f} s"
    yield from paragraphs([(advice["about"], advice["text"]) for advice in found["advice"]])
