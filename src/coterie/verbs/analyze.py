"""How the experts of a model really behave: likeness, norms, routing, and advice. Changes nothing.

Example: coterie analyze MODEL --data prose=prose.txt -o analysis.html
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

from coterie.errors import CoterieError
from coterie.forward.samples import Calibration, Dtype, compute_dtype, counted, dtype_name, read_samples
from coterie.model.layer import Model
from coterie.model.layered import check_single
from coterie.options import Help, ModelPath, Resume, public
from coterie.pages.terminal import Asked
from coterie.storage.folders import check_file
from coterie.storage.record import Progress, Stopwatch, no_progress, versions
from coterie.storage.resumable import Resumable


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
    resume: Resume = False,
    overwrite: Annotated[bool, Help("Replace FILE.html.")] = False,
    on_progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measures the experts of every MoE layer; with `out`, also writes a page of HTML that needs nothing else.

    data, samples, seq_len, seed, dtype: as in `collect`; the seed also draws random experts.
    resume: with `out`, what is finished is kept in FILE.html.partial, layer by layer, from which the same call goes on.
    Returns `{"model", "options", "domains", "layers", "advice", "notes", "versions", "seconds", "peak_rss_bytes"}`.
    "advice" is a list of {"about", "verdict", "number" (in words), "text", "numbers", "command"}. "layers" is a list,
    in order; None stands for what could not be measured. E experts, K chosen per token; each entry holds

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

    Raises: CoterieError; then nothing is left, unless a resume can help.
    """
    clock, page = Stopwatch(), None if out is None else Path(out)
    if page is not None:
        check_file(page, resume=resume, overwrite=overwrite)
    elif resume:
        raise CoterieError("--resume: without --output nothing was kept to go on from; name the same page")
    source = Model.open(model)
    check_single(source)
    chosen = compute_dtype(source, dtype)
    by_domain, notes = read_samples(source, calibration)
    from coterie.decide.abilities import abilities
    from coterie.judge.advice import advise
    from coterie.judge.analysis import limits, measure
    from coterie.judge.commands import Commands
    from coterie.pages.analysis import shown

    commands = Commands(str(model), calibration.named, abilities(source))
    options = calibration.sizes | {"dtype": dtype_name(chosen)}
    asked = {"command": "analyze", "options": options | {"data": calibration.named}, "source": source.checkpoint.hash}
    with Resumable(page, asked, resume=resume, replace=overwrite) if page else nullcontext() as run:
        told = run.start(on_progress) if run else on_progress
        layers = measure(source, by_domain, chosen, calibration.seed, told, page.parent if page else None, run)
        result = {
            "model": {"path": str(model), "hash": source.checkpoint.hash, "family": source.family.name},
            "options": options,
            "domains": counted(by_domain),
            "layers": layers,
            "advice": [vars(advice) for advice in advise(layers, commands)],
            "notes": [*notes, *limits(source, layers)],
            "versions": versions(),
            **clock.read(),
        }
        if run:
            run.finish_file(lambda file: file.write_text(shown(result), encoding="utf-8"))
    return result


def show(found: dict[str, Any], asked: Asked) -> Iterator[str]:
    """Verdicts, each with its number and the command to run next."""
    yield f"{asked['out'] or asked['model']}: done in {found['seconds']:.1f} s"
    for advice in found["advice"]:
        yield from (f"{advice['about']}: {advice['verdict']}", f"  {advice['number']}")
        yield from (f"  {line}" for line in advice["command"].splitlines())
