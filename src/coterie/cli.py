"""The `coterie` command: one command per public function, same options, no logic.

Exit codes: 0 done; 1 a defect of ours; 2 refused; 3 `verify` found a fault; 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import coterie
from coterie.engine import NAMES as ENGINES
from coterie.errors import CoterieError, printable
from coterie.methods import merge as joining
from coterie.methods import prune as pruning
from coterie.methods import sparsify as zeroing
from coterie.methods.condense import names as selections
from coterie.methods.layer_search import SEARCHES
from coterie.storage.copying import IO

app = typer.Typer(
    name="coterie",
    help="Makes mixture-of-experts language models small and cheap to run: checkpoint in, smaller checkpoint out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder of safetensors, or a hub id.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; must not exist.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Decide and show sizes from headers and routers; write nothing.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT, if coterie wrote it.")]
Io = Annotated[str, typer.Option(help=f"How bytes are copied, instead of the first way that works: {', '.join(IO)}.")]
EngineName = Annotated[
    str, typer.Option("--engine", help=f"Where work is done: {', '.join(ENGINES)} (ray: on many machines).")
]
RayAddress = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Of a Ray cluster [default: one is started on this machine].")
]
InPlace = Annotated[
    bool, typer.Option("--in-place", help="Make OUT of MODEL's own files: no second copy, and MODEL is no more.")
]
Save = Annotated[str, typer.Option(help="dense, or sparse: zeros take one bit each, as `coterie pack` stores them.")]
Data = Annotated[list[str] | None, typer.Option("--data", metavar="NAME=FILE", help="A data set; repeatable.")]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="NAME=FILE",
        help="Calibration data: text, JSON lines, Parquet, a folder, or hub:OWNER/NAME; repeatable [default: texts "
        "that ship].",
    ),
]
Lambda1 = Annotated[float, typer.Option(help="Weight of the router rows' distance.")]
Lambda2 = Annotated[float, typer.Option(help="Weight of co-activation; needs --stats.")]
Statistics = Annotated[
    Path | None,
    typer.Option(metavar="STATS", help="What `coterie collect` measured on MODEL: criteria need it, and stun's ties."),
]
Weights = Annotated[
    str | None, typer.Option(metavar="NAME=W,...", help="How often each domain of STATS counts [default: 1 each].")
]
NoGuard = Annotated[bool, typer.Option("--no-guard", help="Let experts with extreme outputs be removed too.")]
Samples = Annotated[int, typer.Option(help="Calibration sequences in all, spread evenly over the names.")]
SeqLen = Annotated[int, typer.Option(help="Tokens of each.")]
Seed = Annotated[int, typer.Option(help="Which passages of the data are drawn.")]
MinTokens = Annotated[int, typer.Option(help="Experts that fewer tokens reach are pruned by magnitude.")]
OnePass = Annotated[
    bool, typer.Option("--one-pass", help="Score all layers on the dense model, not on layers pruned before them.")
]
Also = Annotated[
    str, typer.Option(metavar="KINDS", help="Prune these too, comma-separated: attention, shared, dense, router.")
]
Outliers = Annotated[float, typer.Option(help="OWL's M: outliers score so many times the mean.")]
Dtype = Annotated[str, typer.Option(help="To compute in: auto (as stored), float32, bfloat16 or float16.")]


@app.command()
def inspect(model: Model, json_: Json = False) -> None:
    """Show what is inside: family, experts per layer, bytes by role. Reads headers only."""
    found = coterie.inspect(model)
    if json_:
        _print_json(found)
        return
    counts = sorted(set(found["experts"].values()))
    _table(
        f"{found['path']}: {found['model_type']}",
        [
            (
                "MoE layers",
                f"{found['moe_layers']}" + (f" (+{found['mtp_layers']} MTP)" if found["mtp_layers"] else ""),
            ),
            ("experts per layer", " to ".join(map(str, sorted({counts[0], counts[-1]})))),
            ("chosen per token", f"{found['experts_per_token']}"),
            ("parameters", f"{found['parameters']:,}"),
            ("bytes", f"{found['bytes']:,} in {found['shards']} file(s)"),
            ("bytes of one expert", f"{found['expert_bytes']:,}"),
            *_show_stored(found["packed"]),
            *((f"  {role}", f"{n['bytes']:,} bytes, {n['tensors']:,} tensors") for role, n in found["roles"].items()),
            *(("can", ability) for ability in found["can"]),
        ],
    )


def _show_stored(packed: dict[str, int]) -> list[tuple[str, str]]:
    """What is packed."""
    return [("packed", f"{packed['tensors']:,} tensors in {packed['bytes']:,} bytes")] if packed["tensors"] else []


@app.command()
def prune(
    model: Model,
    out: Out,
    method: Annotated[str, typer.Option(help=f"How experts are chosen: {', '.join(pruning.names())}.")] = "stun",
    ratio: Annotated[float | None, typer.Option(help="Share of experts to remove per layer [default: 0.25].")] = None,
    experts: Annotated[int | None, typer.Option(help="Experts to keep per layer, instead of --ratio.")] = None,
    budget: Annotated[str, typer.Option(help="uniform: every layer alike; global: one height cuts all.")] = "uniform",
    linkage: Annotated[str, typer.Option(help="complete, or official: the published program's rules.")] = "complete",
    distance: Annotated[str, typer.Option(help="frobenius: over the router's norm; or raw.")] = "frobenius",
    kappa: Annotated[int, typer.Option(help="Average clusters in layers left with fewer than this many.")] = 3,
    min_experts: Annotated[int | None, typer.Option(help="Floor of a global budget [default: top-k].")] = None,
    non_uniform: Annotated[str, typer.Option(help="Unequal counts: round, refuse, or coterie (our layout).")] = "round",
    threshold: Annotated[float, typer.Option(help="Where the official global search starts.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the methods random and naee.")] = 0,
    drop_mtp: Annotated[bool, typer.Option("--drop-mtp", help="Leave multi-token-prediction layers out.")] = False,
    lambda1: Lambda1 = 1.0,
    lambda2: Lambda2 = 0.0,
    stats: Statistics = None,
    weights: Weights = None,
    no_guard: NoGuard = False,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL0", help="The checkpoint before training, for router-norm-change.")
    ] = None,
    data: Calibration = None,
    samples: Samples = 128,
    seq_len: SeqLen = 2048,
    dtype: Dtype = "auto",
    removed: Annotated[
        str | None,
        typer.Option(
            help="What becomes of removed experts' router rows: remove; or, in our layout, null or constant: they "
            "stay, and give zero or a mean output [default: remove; mone: constant]."
        ),
    ] = None,
    save: Save = "dense",
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    io: Io = "auto",
    engine: EngineName = "local",
    ray_address: RayAddress = None,
    in_place: InPlace = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove experts: by default STUN's, which finds experts that behave alike from router weights alone.

    Example: coterie prune MODEL OUT --ratio 0.25
    """
    with _progress(quiet or json_) as on_progress:
        report = coterie.prune(
            model, out, method=method, ratio=ratio, experts=experts, budget=budget, linkage=linkage,
            distance=distance, kappa=kappa, min_experts=min_experts, non_uniform=non_uniform,
            threshold=threshold, seed=seed, drop_mtp=drop_mtp, lambda1=lambda1, lambda2=lambda2, stats=stats,
            weights=weights, no_guard=no_guard, base=base, data=data or [], samples=samples, seq_len=seq_len,
            dtype=dtype, removed=removed, save=save, dry_run=dry_run, resume=resume, overwrite=overwrite,
            io=io, engine=engine, ray_address=ray_address, in_place=in_place, on_progress=on_progress,
        )  # fmt: skip
    _show_report(report, out, json_)


@app.command()
def stun(
    model: Model,
    out: Out,
    sparsity: Annotated[float, typer.Option(help="Share of expert weights to remove or zero, exactly.")] = 0.4,
    expert_ratio: Annotated[
        str | None, typer.Option(help="Share of experts to remove, or auto [default: half of --sparsity].")
    ] = None,
    second: Annotated[str, typer.Option(help=f"How weights are zeroed: {', '.join(zeroing.names())}.")] = "owl",
    preset: Annotated[
        str, typer.Option(help="recommended: expert matrices only; paper: every linear map, as published.")
    ] = "recommended",
    lambda1: Lambda1 = 1.0,
    lambda2: Lambda2 = 0.0,
    stats: Statistics = None,
    no_guard: NoGuard = False,
    one_pass: OnePass = False,
    also: Also = "",
    data: Calibration = None,
    samples: Samples = 128,
    seq_len: SeqLen = 2048,
    seed: Seed = 0,
    min_tokens: Annotated[
        int | None,
        typer.Option(help="Experts that fewer tokens reach are pruned by magnitude [default: 64; paper: 1]."),
    ] = None,
    outliers: Outliers = 3.0,
    dtype: Dtype = "auto",
    save: Save = "dense",
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    io: Io = "auto",
    engine: EngineName = "local",
    ray_address: RayAddress = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """STUN: redundant experts out, then zeros inside the rest, at one exact total.

    Example: coterie stun MODEL OUT --sparsity 0.40 --data code=code.txt --data prose=prose.txt
    """
    with _progress(quiet or json_) as on_progress:
        report = coterie.stun(
            model, out, sparsity=sparsity, expert_ratio=_ratio(expert_ratio), second=second, preset=preset,
            lambda1=lambda1, lambda2=lambda2, stats=stats, no_guard=no_guard, one_pass=one_pass, also=also,
            data=data or [],
            samples=samples, seq_len=seq_len, seed=seed, min_tokens=min_tokens, outliers=outliers, dtype=dtype,
            save=save, dry_run=dry_run, resume=resume, overwrite=overwrite, io=io, engine=engine,
            ray_address=ray_address, on_progress=on_progress,
        )  # fmt: skip
    _show_report(report, out, json_)


def _ratio(text: str | None) -> float | str | None:
    try:
        return text if text is None else float(text)
    except ValueError:
        return text


@app.command()
def sparsify(
    model: Model,
    out: Out,
    method: Annotated[str, typer.Option(help=f"How weights are chosen: {', '.join(zeroing.names())}.")] = "wanda",
    sparsity: Annotated[float | None, typer.Option(help="Share of expert weights to zero [default: 0.5].")] = None,
    pattern: Annotated[
        str | None, typer.Option(metavar="N:M", help="Zero N of every M consecutive inputs, instead of --sparsity.")
    ] = None,
    one_pass: OnePass = False,
    also: Also = "",
    data: Calibration = None,
    samples: Samples = 128,
    seq_len: SeqLen = 2048,
    seed: Seed = 0,
    min_tokens: MinTokens = 64,
    outliers: Outliers = 3.0,
    dtype: Dtype = "auto",
    save: Save = "dense",
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    io: Io = "auto",
    engine: EngineName = "local",
    ray_address: RayAddress = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Zero single weights inside the routed experts; all experts stay.

    Example: coterie sparsify MODEL OUT --method owl --sparsity 0.5 --data code=code.txt
    """
    with _progress(quiet or json_) as on_progress:
        report = coterie.sparsify(
            model, out, method=method, sparsity=sparsity, pattern=pattern, one_pass=one_pass, also=also,
            data=data or [], samples=samples, seq_len=seq_len, seed=seed, min_tokens=min_tokens, outliers=outliers,
            dtype=dtype, save=save, dry_run=dry_run, resume=resume, overwrite=overwrite, io=io, engine=engine,
            ray_address=ray_address, on_progress=on_progress,
        )  # fmt: skip
    _show_report(report, out, json_)


@app.command()
def merge(
    model: Model,
    out: Out,
    method: Annotated[str, typer.Option(help=f"Which experts are alike: {', '.join(joining.names())}.")] = "hc-smoe",
    ratio: Annotated[float | None, typer.Option(help="Share of experts to lose per layer [default: 0.25].")] = None,
    experts: Annotated[int | None, typer.Option(help="Experts to have per layer, instead of --ratio.")] = None,
    router: Annotated[
        str, typer.Option(help="mean: rows are merged too; alias: rows stay, several lead to one (our layout).")
    ] = "mean",
    align: Annotated[bool, typer.Option("--align", help="Line neurons up before they are averaged.")] = False,
    stats: Annotated[
        Path | None, typer.Option(metavar="STATS", help="What `coterie collect --merging` measured, instead of --data.")
    ] = None,
    weights: Weights = None,
    data: Calibration = None,
    samples: Samples = 128,
    seq_len: SeqLen = 2048,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    save: Save = "dense",
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge experts that do alike into their weighted mean: HC-SMoE or M-SMoE.

    Example: coterie merge MODEL OUT --experts 24 --data prose=prose.txt
    """
    with _progress(quiet or json_) as on_progress:
        report = coterie.merge(
            model, out, method=method, ratio=ratio, experts=experts, router=router, align=align, stats=stats,
            weights=weights, data=data or [], samples=samples, seq_len=seq_len, seed=seed, dtype=dtype,
            save=save, dry_run=dry_run, resume=resume, overwrite=overwrite, on_progress=on_progress,
        )  # fmt: skip
    _show_report(report, out, json_)


@app.command()
def condense(
    model: Model,
    out: Out,
    layers: Annotated[int | None, typer.Option(help="How many layers to condense; which is searched for.")] = None,
    layer_ids: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Which decoder layers, instead of --layers.")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(help="Experts always on in each, beside the shared one [default: top-k].")
    ] = None,
    select: Annotated[str, typer.Option(help=f"How experts are chosen: {', '.join(selections())}.")] = "least-squares",
    layer_search: Annotated[
        str | None, typer.Option(help=f"How layers are chosen: {', '.join(SEARCHES)} [default: greedy].")
    ] = None,
    data: Calibration = None,
    samples: Annotated[
        int | None, typer.Option(help="Calibration sequences in all [default: 128; official: 100].")
    ] = None,
    seq_len: SeqLen = 2048,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    save: Save = "dense",
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    io: Io = "auto",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """CD-MoE: turn MoE layers into small dense ones: the shared expert and a few experts, always on.

    Example: coterie condense MODEL OUT --layers 9 --data prose=prose.txt
    """
    with _progress(quiet or json_) as on_progress:
        report = coterie.condense(
            model, out, layers=layers, layer_ids=layer_ids, keep=keep, select=select, layer_search=layer_search,
            data=data or [], samples=samples, seq_len=seq_len, seed=seed, dtype=dtype, save=save,
            dry_run=dry_run, resume=resume,
            overwrite=overwrite, io=io, on_progress=on_progress,
        )  # fmt: skip
    _show_report(report, out, json_)


@app.command()
def recover(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A folder that `coterie condense` wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT2", help="The folder to write; must not exist.")],
    teacher: Annotated[str | None, typer.Option(metavar="MODEL", help="The original, to learn from.")] = None,
    data: Calibration = None,
    stage: Annotated[str, typer.Option(help="all (local, then distill), local, distill, or lm.")] = "all",
    layer_ids: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="With --stage lm: train these layers of any model instead.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps of each stage.")] = 200,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate [default: by the model's width].")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples per forward.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Forwards per step.")] = 1,
    seq_len: Annotated[int, typer.Option(help="Tokens of each sample.")] = 256,
    samples: Annotated[int, typer.Option(help="Samples in all, spread evenly over the names.")] = 2048,
    seed: Seed = 0,
    dtype: Annotated[str, typer.Option(help="To compute in: auto (as stored), float32 or bfloat16.")] = "auto",
    save_every: Annotated[int, typer.Option(help="Steps between two states that --resume goes on from.")] = 100,
    save: Save = "dense",
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    io: Io = "auto",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune the condensed layers, and nothing else.

    Example: coterie recover OUT OUT2 --teacher MODEL --data prose=prose.txt
    """
    with _progress(quiet or json_) as on_progress:
        report = coterie.recover(
            model, out, teacher=teacher, data=data or [], stage=stage, layer_ids=layer_ids, steps=steps, lr=lr,
            batch_size=batch_size, accumulate=accumulate, seq_len=seq_len, samples=samples, seed=seed, dtype=dtype,
            save_every=save_every, save=save, dry_run=dry_run, resume=resume, overwrite=overwrite, io=io,
            on_progress=on_progress,
        )  # fmt: skip
    _show_report(report, out, json_)


@app.command()
def drop(
    model: Model,
    out: Out,
    unit: Annotated[str, typer.Option(help="layer: the MoE inside a decoder layer; block: all of it.")] = "layer",
    count: Annotated[int, typer.Option(help="How many, by the similarity of what enters and leaves.")] = 1,
    data: Calibration = None,
    samples: Samples = 128,
    seq_len: SeqLen = 2048,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    save: Save = "dense",
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    io: Io = "auto",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Drop whole MoE layers or decoder layers: the baselines that condensing is held against.

    Example: coterie drop MODEL OUT --unit block --count 2 --data prose=prose.txt
    """
    with _progress(quiet or json_) as on_progress:
        report = coterie.drop(
            model, out, unit=unit, count=count, data=data or [], samples=samples, seq_len=seq_len, seed=seed,
            dtype=dtype, save=save, dry_run=dry_run, resume=resume, overwrite=overwrite, io=io, on_progress=on_progress,
        )  # fmt: skip
    _show_report(report, out, json_)


@app.command()
def collect(
    model: Model,
    stats: Annotated[Path, typer.Argument(metavar="STATS", help="The file to write; must not exist.")],
    data: Calibration = None,
    samples: Samples = 128,
    seq_len: SeqLen = 2048,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    merging: Annotated[
        bool, typer.Option("--merging", help="Also what merge needs: every expert on every token, so much slower.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace STATS.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure once what the experts do on data; criteria read the one file.

    Example: coterie collect MODEL STATS --data code=code.txt --data prose=prose.txt
    """
    with _progress(quiet or json_) as on_progress:
        result = coterie.collect(
            model, stats, data=data or [], samples=samples, seq_len=seq_len, seed=seed, dtype=dtype,
            merging=merging, overwrite=overwrite, on_progress=on_progress,
        )  # fmt: skip
    for note in result["notes"]:
        _say(f"note: {note}", err=True)
    if json_:
        _print_json(result)
        return
    _table(
        f"{stats}: done in {result['seconds']:.1f} s",
        [(f"data {name}", f"{n['samples']:,} samples, {n['tokens']:,} tokens") for name, n in result["domains"].items()]
        + [("MoE layers", f"{len(result['layers']):,}"), ("peak memory", f"{result['peak_rss_bytes'] / 1e6:.0f} MB")],
    )


@app.command()
def compare(
    model: Model,
    stats: Annotated[Path, typer.Argument(metavar="STATS", help="What `coterie collect` measured on MODEL.")],
    ratio: Annotated[float | None, typer.Option(help="Share of experts to remove per layer [default: 0.25].")] = None,
    experts: Annotated[int | None, typer.Option(help="Experts to keep per layer, instead of --ratio.")] = None,
    weights: Weights = None,
    no_guard: NoGuard = False,
    seed: Annotated[int, typer.Option(help="Of the random control.")] = 0,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """What each criterion would keep: how much they agree, and how much of it is chance. Writes nothing.

    Example: coterie compare MODEL STATS --ratio 0.25
    """
    with _progress(quiet or json_) as on_progress:
        found = coterie.compare(
            model, stats, ratio=ratio, experts=experts, weights=weights, no_guard=no_guard, seed=seed,
            on_progress=on_progress,
        )  # fmt: skip
    for note in found["notes"]:
        _say(f"note: {note}", err=True)
    if json_:
        _print_json(found)
        return
    names = list(found["criteria"])
    _say("share of kept experts in common (and of the same criterion on two halves of the data)")
    _table(" " * 20 + "  ".join(f"{n:>18}" for n in names), [(n, _overlaps(found, n, names)) for n in names])
    _say(f"by chance: {found['random']['expected']:.2f}; {found['seconds']:.1f} s")


def _overlaps(found: dict[str, Any], name: str, names: list[str]) -> str:
    stable = found["criteria"][name]["stability"]
    own = f"({stable['mean']:.2f})" if stable else "(-)"
    return "  ".join(f"{own if other == name else format(found['overlap'][name][other], '.2f'):>18}" for other in names)


@app.command()
def analyze(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.html", help="Write a page that needs nothing else.")
    ] = None,
    data: Calibration = None,
    samples: Samples = 128,
    seq_len: SeqLen = 2048,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.html.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """How the experts of a model really behave: likeness, norms, routing, and advice. Changes nothing.

    Example: coterie analyze MODEL --data prose=prose.txt -o analysis.html
    """
    with _progress(quiet or json_) as on_progress:
        found = coterie.analyze(
            model, data=data or [], samples=samples, seq_len=seq_len, seed=seed, dtype=dtype, out=output,
            overwrite=overwrite, on_progress=on_progress,
        )  # fmt: skip
    for note in found["notes"]:
        _say(f"note: {note}", err=True)
    if json_:
        _print_json(found)
        return
    typer.echo(f"{output or model}: done in {found['seconds']:.1f} s")
    _paragraphs([(advice["about"], advice["text"]) for advice in found["advice"]])


@app.command()
def apply(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A coterie.json, or its plan alone.")],
    out: Out,
    save: Save = "dense",
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    io: Io = "auto",
    engine: EngineName = "local",
    ray_address: RayAddress = None,
    in_place: InPlace = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Execute a saved or hand-edited plan.

    Example: coterie apply MODEL PRUNED/coterie.json OUT
    """
    with _progress(quiet or json_) as on_progress:
        report = coterie.apply(
            model, plan, out, save=save, dry_run=dry_run, resume=resume, overwrite=overwrite, io=io, engine=engine,
            ray_address=ray_address, in_place=in_place, on_progress=on_progress,
        )  # fmt: skip
    _show_report(report, out, json_)


@app.command()
def pack(
    model: Annotated[str, typer.Argument(metavar="DENSE", help="A folder whose matrices hold zeros.")],
    out: Out,
    values: Annotated[
        str, typer.Option(help="as stored, or int8: rounded, with a scale per 128 columns.")
    ] = "as stored",
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Store zeros as one bit each: smaller on disk and in memory, and faster to decode from.

    Example: coterie pack OUT PACKED
    """
    with _progress(quiet or json_) as on_progress:
        report = coterie.pack(
            model, out, values=values, dry_run=dry_run, resume=resume, overwrite=overwrite, on_progress=on_progress
        )
    _show_packed(report, out, json_)


@app.command()
def unpack(
    model: Annotated[str, typer.Argument(metavar="PACKED", help="A folder that `coterie pack` wrote.")],
    out: Out,
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Restore the dense checkpoint, byte for byte.

    Example: coterie unpack PACKED DENSE
    """
    with _progress(quiet or json_) as on_progress:
        report = coterie.unpack(
            model, out, dry_run=dry_run, resume=resume, overwrite=overwrite, on_progress=on_progress
        )
    _show_packed(report, out, json_)


def _show_packed(report: Any, out: Path, as_json: bool) -> None:
    found = report.report
    for warning in found.get("warnings", []):
        _say(f"note: {warning}", err=True)
    if as_json:
        _print_json(report.as_dict())
        return
    done = found["packed"] if "packed" in found else found["unpacked"]
    before, after = done["before"], done["after"]
    title = "planned, nothing written" if found.get("dry_run") else f"{out}: done"
    rows = [("bytes", f"{before:,} -> {after:,} ({after / before:.3f})"), ("matrices", f"{done['tensors']:,}")]
    if "zeros" in done:
        rows.append(("of which zeros", f"{100 * done['zeros']:.2f} %"))
    _table(title, rows)


@app.command()
def status(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="What a command was told to write, or its OUT.partial.")],
    json_: Json = False,
) -> None:
    """Show how far a run is, or was when it ended: what was asked, what is done, the rate, the time left.

    Example: coterie status OUT
    """
    found = coterie.status(out)
    if json_:
        _print_json(found)
        return
    rows = [("command", f"coterie {found['command']}")]
    rows += [(f"  {name}", f"{value}") for name, value in found["options"].items() if value not in (None, "", {})]
    if "bytes" in found:
        rows += [("process", f"{found['pid']}, {'alive' if found['alive'] else 'gone'}")]
        rows += [("began", f"{found['began']}"), ("last heard of", f"{found['updated']}")]
        rows += [(kind, f"{found[kind]['done']:,} of {_known(found[kind]['all'])}") for kind in ("files", "bytes")]
        rows += [("layers", f"{found['layers']['done']:,} of {_known(found['layers']['all'])}")]
        rows += [("MB per second", _known(found["bytes_per_second"], 1e6))]
        rows += [("seconds left", _known(found["seconds_left"]))]
    rows += [("note", found["note"])] if "note" in found else []
    _table(f"{found['path']}: {found['state']}", rows)


def _known(value: float | None, unit: float = 1) -> str:
    return "unknown" if value is None else f"{value / unit:,.0f}"


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to go on from; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token each time; else drawn.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    dtype: Dtype = "auto",
    json_: Json = False,
) -> None:
    """Continue a text with any checkpoint, packed ones too; words appear as they come.

    Example: coterie generate OUT --prompt "Once upon a time"
    """
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    result = coterie.generate(
        model, text, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, dtype=dtype,
        on_text=(lambda _: None) if json_ else _say_at_once,
    )  # fmt: skip
    for note in result["notes"]:
        typer.echo(f"note: {note}", err=True)
    if json_:
        _print_json(result)
    else:
        typer.echo()


def _say_at_once(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@app.command()
def bench(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A folder of safetensors, packed or not, or a hub id.")],
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="Another one, measured in turn with it.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads to compute with [default: torch's number].")] = None,
    batch: Annotated[str, typer.Option(metavar="A,B,...", help="Sequences that run together.")] = "1,4,16",
    dtype: Dtype = "auto",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure tokens per second, bytes read per token, and the share of what the memory can deliver. Writes nothing.

    Example: coterie bench PACKED --against DENSE
    """
    with _progress(quiet or json_) as on_progress:
        found = coterie.bench(
            model, against=against, threads=threads, batch=batch, dtype=dtype, on_progress=on_progress
        )
    for note in found["notes"]:
        typer.echo(f"note: {note}", err=True)
    if json_:
        _print_json(found)
        return
    about = found["machine"]
    read = f"{found['bandwidth'] / 1e9:.1f} GB/s" if found["bandwidth"] else "not measured"
    rows = [("kernels", ", ".join(about["kernels"])), ("threads", f"{about['threads']} of {about['cores']} cores")]
    _table(about["processor"], [*rows, ("read bandwidth", read), ("clock", found["clock"])])
    for entry in found["models"]:
        share = entry["bandwidth_share"]
        rows = [("bytes", f"{entry['bytes']:,}"), ("bytes read per token", _known(entry["bytes_per_token"]))]
        rows += [("share of bandwidth", "unknown" if share is None else f"{100 * share:.0f} %")]
        for kind in ("prefill", "decode"):
            rows += [(f"{kind}, batch {b}", _speed(q)) for b, q in entry[kind].items()]
        _table(entry["path"], rows)
    if found["kernels"]:
        _show_kernels(found["kernels"])


def _speed(found: dict[str, float]) -> str:
    return f"{found['50']:,.1f} tokens/s  [{found['10']:,.1f}, {found['90']:,.1f}]"


def _show_kernels(found: dict[str, Any]) -> None:
    """One line per kernel, and how often faster it is than each rival."""
    rows, columns = found["shape"]
    rivals = list(found["rows"][0]["times_faster_than"]) if found["rows"] else []
    typer.echo(f"{found['tensor']}: {rows} x {columns}, {100 * found['zeros']:.1f} % zeros")
    for row in found["rows"]:
        share = row["bandwidth_share"]
        of = "" if share is None else f", {100 * share:.0f} % of bandwidth"
        typer.echo(f"  {row['name']}: {row['bytes']:,} bytes, {1e6 * row['seconds']:.1f} us{of}")
        if row["name"].startswith("sparse"):
            ratios = (f"{row['times_faster_than'][rival]:.2f} of {rival}" for rival in rivals)
            typer.echo(f"    speed: {', '.join(ratios)}")


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that coterie wrote.")],
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="The original, to compare with.")] = None,
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="Text or JSONL to compute logits on.")] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a result: every tensor accounted for, loads in stock transformers, computes what it should.

    Exits with 3 when a check finds a fault. Example: coterie verify OUT --against MODEL
    """
    with _progress(quiet or json_) as on_progress:
        result = coterie.verify(out, against=against, data=data, on_progress=on_progress)
    if json_:
        _print_json(result)
    else:
        for check in result["checks"]:
            _say(f"{'ok   ' if check['ok'] else 'FAULT'}  {check['name']}: {check['detail']}")
    raise typer.Exit(0 if result["ok"] else 3)


@app.command(name="eval")
def eval_(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders or hub ids.")],
    data: Data = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original, to compare with on the same tokens.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of context per window.")] = 2048,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows [default: half the window].")] = None,
    tasks: Annotated[str | None, typer.Option(help="Comma-separated lm-evaluation-harness tasks.")] = None,
    task_path: Annotated[Path | None, typer.Option(help="A folder with task files of your own.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Longest generated answer.")] = 128,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure models: perplexity per data set; exact match where lines are {"prompt", "answer"}.

    Example: coterie eval MODEL OUT --data prose=prose.txt --data sums=problems.jsonl
    """
    names = tuple(t for t in (tasks or "").split(",") if t)
    with _progress(quiet or json_) as on_progress:
        result = coterie.eval(
            models, data=data or [], against=against, window=window, stride=stride, tasks=names, task_path=task_path,
            batch_size=batch_size, max_new_tokens=max_new_tokens, dtype=dtype, seed=seed, on_progress=on_progress,
        )  # fmt: skip
    if json_:
        _print_json(result)
        return
    for entry in result["models"]:
        rows = [(f"perplexity {n}", _interval(v)) for n, v in entry["perplexity"].items()]
        rows += [(f"exact match {n}", _interval(v, percent=True)) for n, v in entry["exact_match"].items()]
        rows += [(f"task {n}", json.dumps(v)) for n, v in entry.get("tasks", {}).items()]
        _table(entry["path"], rows + _paired(entry.get("paired")))


def _paired(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What a comparison with the original adds."""
    if found is None:
        return []
    rows = [
        (f"log-likelihood {n}", f"{v['value']:+.4f}  [{v['low']:+.4f}, {v['high']:+.4f}] nats per token, difference")
        for n, v in found["difference"].items()
    ]
    rows += [(f"flipped {n}", f"{100 * share:.2f} % of the answers") for n, share in found["flipped"].items()]
    for name, shares in found["repetition"].items():
        own, theirs = ("none" if shares[k] is None else f"{100 * shares[k]:.2f} %" for k in ("model", "against"))
        rows.append((f"repetition {name}", f"{own} (original {theirs}) of generated 4-grams"))
    if overlap := found["router_overlap"]:
        rows.append(("router overlap", f"{sum(overlap.values()) / len(overlap):.3f}, mean of {len(overlap)} layers"))
    return [*rows, ("compared with", found["against"])]


@app.command()
def report(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="The original first, then what was made of it.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The page to write; must not exist.")],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="NAME=FILE", help="As for eval; repeatable [default: texts that ship]."),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of context per window.")] = 2048,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows [default: half the window].")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Longest generated answer.")] = 128,
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Do not measure tokens per second.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quality against bytes against speed: one page with plots and tables, which opens without a network.

    Example: coterie report MODEL OUT1 OUT2 -o report.html --data prose=prose.txt
    """
    with _progress(quiet or json_) as on_progress:
        found = coterie.report(
            models, out, data=data or [], window=window, stride=stride, batch_size=batch_size,
            max_new_tokens=max_new_tokens, dtype=dtype, seed=seed, speed=not no_speed, overwrite=overwrite,
            on_progress=on_progress,
        )  # fmt: skip
    for note in found["notes"]:
        typer.echo(f"note: {note}", err=True)
    if json_:
        _print_json(found)
        return
    entries = [*found["models"], *found["references"]]
    shown = [f"{m['bytes']:,} bytes" + (f", loss {_interval(m['mean'])}" if m["mean"] else "") for m in entries]
    _table(f"{out}: written in {found['seconds']:.1f} s", list(zip((m["name"] for m in entries), shown, strict=True)))


def _interval(found: dict[str, float], *, percent: bool = False) -> str:
    scale, unit = (100, " %") if percent else (1, "")
    return f"{found['value'] * scale:.2f}{unit}  [{found['low'] * scale:.2f}, {found['high'] * scale:.2f}]"


def _show_report(report: Any, out: Path, as_json: bool) -> None:
    content = report.as_dict()
    for warning in report.report.get("warnings", []):
        _say(f"note: {warning}", err=True)
    if as_json:
        _print_json(content)
        return
    before, after = report.report["before"], report.report["after"]
    title = "planned, nothing written" if report.report.get("dry_run") else f"{out}: done"
    _table(
        f"{title} in {report.report['seconds']:.1f} s",
        [
            ("parameters", f"{before['parameters']:,} -> {after['parameters']:,}"),
            ("bytes", f"{before['bytes']:,} -> {after['bytes']:,}"),
            *_show_saved(report.report),
            ("experts per layer", f"{before['experts']} -> {after['experts']}"),
            ("experts' weights removed or zero", f"{100 * report.report['sparsity']['experts']:.2f} %"),
            ("all weights removed or zero", f"{100 * report.report['sparsity']['all']:.2f} %"),
            *_show_zeros(report.report),
            ("peak memory", f"{report.report['peak_rss_bytes'] / 1e6:.0f} MB"),
        ],
    )


def _show_saved(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What packing did to the bytes."""
    packed = found.get("packed")
    if not packed:
        return []
    return [("packed", f"{packed['tensors']:,} matrices: {packed['before']:,} -> {packed['after']:,} bytes in all")]


def _show_zeros(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What unstructured pruning adds."""
    if "expert_zeros" not in found:
        return []
    kurtosis = " -> ".join("none" if k is None else f"{k:.3f}" for k in found["kurtosis"].values())
    cold = len(found["cold_experts"])
    return [
        ("zeros in experts", f"{found['expert_zeros']:,}"),
        ("kurtosis of their weights", kurtosis),
        ("experts too cold to calibrate", f"{cold:,}" + (" (pruned by magnitude)" if cold else "")),
    ]


def _table(title: str, rows: list[tuple[str, str]]) -> None:
    _say(title)
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        _say(f"  {name:<{width}}  {value}")


def _say(line: str, *, err: bool = False) -> None:
    """Prints a line. Names come from files: what a terminal would obey is spelled out."""
    typer.echo(printable(line), err=err)


def _paragraphs(rows: list[tuple[str, str]]) -> None:
    """Names beside texts that are wrapped to the terminal's width."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 1, 2))
    for name, text in rows:
        grid.add_row(Text(name), Text(text))
    Console().print(grid)


def _print_json(value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    # Outside strings JSON has no such characters, and inside them it may spell out any.
    sys.stdout.write("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text) + "\n")


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on standard error, one per stage; silent when asked, or when nobody watches."""
    if quiet or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    amount = TextColumn("{task.percentage:>3.0f} %  {task.fields[amount]}")
    columns = (TextColumn("{task.description}"), BarColumn(), amount)
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}
        began: dict[str, float] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage], began[stage] = bars.add_task(stage, total=total, amount=""), time.monotonic()
            amount = _amount(stage, done, total, time.monotonic() - began[stage])
            bars.update(tasks[stage], completed=done, total=total, amount=amount)

        yield advance


def _amount(stage: str, done: int, total: int, seconds: float) -> str:
    """How much of how much, and how fast where it is bytes."""
    if stage != "writing":
        return f"{done:,} of {total:,}"
    rate = f", {done / seconds / 1e6:,.0f} MB/s" if seconds > 1 else ""
    return f"{done / 1e9:,.1f} of {total / 1e9:,.1f} GB{rate}"


def main(arguments: list[str] | None = None) -> None:
    """Runs the command and exits with its code; every refusal is one line on standard error."""
    logging.basicConfig(format="note: %(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="coterie", standalone_mode=False)
        if code == 130:  # what some versions of typer make of Ctrl-C, and others an Abort
            _interrupted()
        sys.exit(code if isinstance(code, int) else 0)
    except CoterieError as error:
        _refuse(error)
    except KeyboardInterrupt:
        _interrupted()
    except Exception as error:
        # typer's errors come from click or from its own copy of it, by version: known by what they can do.
        if type(error).__name__ == "Abort":
            _interrupted()
        if not hasattr(error, "format_message"):
            raise  # a defect of ours: the traceback is what we want to see, and Python exits with 1
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message())
            sys.exit(2)
        _refuse(error.format_message())


def _interrupted() -> None:
    _say("interrupted; a command that writes OUT goes on with --resume", err=True)
    sys.exit(130)


def _refuse(error: object) -> None:
    line = " ".join(str(error).split())
    _say(f"error: {line}", err=True)
    sys.exit(2)
