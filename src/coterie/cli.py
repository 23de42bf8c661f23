"""The `coterie` command: one command per public function, same options, no logic.

Exit codes: 0 done; 1 a defect of ours; 2 refused; 3 `verify` found a fault; 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import coterie
from coterie.errors import CoterieError
from coterie.methods import prune as methods

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
Data = Annotated[list[str] | None, typer.Option("--data", metavar="NAME=FILE", help="A data set; repeatable.")]


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
            *((f"  {role}", f"{n['bytes']:,} bytes, {n['tensors']:,} tensors") for role, n in found["roles"].items()),
            *(("can", ability) for ability in found["can"]),
        ],
    )


@app.command()
def prune(
    model: Model,
    out: Out,
    method: Annotated[str, typer.Option(help=f"How experts are chosen: {', '.join(methods.names())}.")] = "stun",
    ratio: Annotated[float | None, typer.Option(help="Share of experts to remove per layer [default: 0.25].")] = None,
    experts: Annotated[int | None, typer.Option(help="Experts to keep per layer, instead of --ratio.")] = None,
    budget: Annotated[str, typer.Option(help="uniform: every layer alike; global: one height cuts all.")] = "uniform",
    linkage: Annotated[str, typer.Option(help="complete, or official: the published program's rules.")] = "complete",
    distance: Annotated[str, typer.Option(help="frobenius: over the router's norm; or raw.")] = "frobenius",
    kappa: Annotated[int, typer.Option(help="Average clusters in layers left with fewer than this many.")] = 3,
    min_experts: Annotated[int | None, typer.Option(help="Floor of a global budget [default: top-k].")] = None,
    non_uniform: Annotated[str, typer.Option(help="Unequal counts: round, refuse, or coterie (our layout).")] = "round",
    threshold: Annotated[float, typer.Option(help="Where the official global search starts.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the method random.")] = 0,
    drop_mtp: Annotated[bool, typer.Option("--drop-mtp", help="Leave multi-token-prediction layers out.")] = False,
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
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
            threshold=threshold, seed=seed, drop_mtp=drop_mtp, dry_run=dry_run, resume=resume, overwrite=overwrite,
            on_progress=on_progress,
        )  # fmt: skip
    _show_report(report, out, json_)


@app.command()
def apply(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A coterie.json, or its plan alone.")],
    out: Out,
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Execute a saved or hand-edited plan.

    Example: coterie apply MODEL PRUNED/coterie.json OUT
    """
    with _progress(quiet or json_) as on_progress:
        report = coterie.apply(
            model, plan, out, dry_run=dry_run, resume=resume, overwrite=overwrite, on_progress=on_progress
        )
    _show_report(report, out, json_)


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
            typer.echo(f"{'ok   ' if check['ok'] else 'FAULT'}  {check['name']}: {check['detail']}")
    raise typer.Exit(0 if result["ok"] else 3)


@app.command(name="eval")
def eval_(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders or hub ids.")],
    data: Data = None,
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
            models, data=data or [], window=window, stride=stride, tasks=names, task_path=task_path,
            batch_size=batch_size, max_new_tokens=max_new_tokens, dtype=dtype, seed=seed, on_progress=on_progress,
        )  # fmt: skip
    if json_:
        _print_json(result)
        return
    for entry in result["models"]:
        rows = [(f"perplexity {n}", _interval(v)) for n, v in entry["perplexity"].items()]
        rows += [(f"exact match {n}", _interval(v, percent=True)) for n, v in entry["exact_match"].items()]
        rows += [(f"task {n}", json.dumps(v)) for n, v in entry.get("tasks", {}).items()]
        _table(entry["path"], rows)


def _interval(found: dict[str, float], *, percent: bool = False) -> str:
    scale, unit = (100, " %") if percent else (1, "")
    return f"{found['value'] * scale:.2f}{unit}  [{found['low'] * scale:.2f}, {found['high'] * scale:.2f}]"


def _show_report(report: Any, out: Path, as_json: bool) -> None:
    content = report.as_dict()
    for warning in report.report.get("warnings", []):
        typer.echo(f"note: {warning}", err=True)
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
            ("experts per layer", f"{before['experts']} -> {after['experts']}"),
            ("experts' weights removed", f"{100 * report.report['sparsity']['experts']:.2f} %"),
            ("all weights removed", f"{100 * report.report['sparsity']['all']:.2f} %"),
            ("peak memory", f"{report.report['peak_rss_bytes'] / 1e6:.0f} MB"),
        ],
    )


def _table(title: str, rows: list[tuple[str, str]]) -> None:
    typer.echo(title)
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        typer.echo(f"  {name:<{width}}  {value}")


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on standard error, one per stage; silent when asked, or when nobody watches."""
    if quiet or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield advance


def main(arguments: list[str] | None = None) -> None:
    """Runs the command and exits with its code; every refusal is one line on standard error."""
    logging.basicConfig(format="note: %(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="coterie", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except CoterieError as error:
        _refuse(error)
    except KeyboardInterrupt:
        typer.echo("interrupted; add --resume to go on", err=True)
        sys.exit(130)
    except Exception as error:
        # typer's errors come from click or from its own copy of it, by version: known by what they can do.
        if type(error).__name__ == "Abort":
            sys.exit(130)
        if not hasattr(error, "format_message"):
            raise  # a defect of ours: the traceback is what we want to see, and Python exits with 1
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message())
            sys.exit(2)
        _refuse(error.format_message())


def _refuse(error: object) -> None:
    line = " ".join(str(error).split())
    typer.echo(f"error: {line}", err=True)
    sys.exit(2)
