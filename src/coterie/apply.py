"""Executes a plan: moves the bytes of what stays, renames and renumbers, patches config.json.

Kept experts are copied verbatim, never decoded: memory stays flat whatever the model's size. Everything that a
plan could get wrong is checked before a byte is written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from coterie.checkpoint import PICKLES, Checkpoint, Tensor, leads_outside, load_json
from coterie.condensing.dense import check_dense, dense_outputs, patch_dense
from coterie.condensing.dropping import check_dropped, dropped_outputs, patch_dropped
from coterie.condensing.repackage import converted
from coterie.engine import Engine
from coterie.errors import CoterieError
from coterie.experts import expert_weights
from coterie.family import lookup
from coterie.layer import Model, MoE, expert_axis, expert_names, find_blocks, mtp_names
from coterie.merging import Members, mean
from coterie.plan import Choice, Plan, command_of, read_plan, to_json
from coterie.report import Progress, Report, Stopwatch, count, model_card, no_progress, removed_shares, versions
from coterie.routes import (
    check_routes,
    constants_name,
    constants_output,
    is_routed,
    routed_blocks,
    say_routes,
    sealed,
)
from coterie.view import resolved, root, view
from coterie.writing.copying import check_io
from coterie.writing.in_place import Recipe, check_in_place, consume, went_on
from coterie.writing.spread import mover
from coterie.writing.writer import Hole, Made, Output, Run, Writer, check_out, num_copied, partial_of, tidy

COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
COPIED_NAMES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
MAX_COPIED = 2**30  # bytes of a file that travels along; a sparse one can claim any size
OURS = ("coterie.json", "coterie.log", "README.md", "report.html")
MERGEABLE = ("F64", "F32", "F16", "BF16")


def apply(
    model: str | Path,
    plan: str | Path | dict[str, Any],
    out: str | Path,
    *,
    recorded: dict[str, Any] | None = None,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    io: str = "auto",
    engine: str = "local",
    ray_address: str | None = None,
    in_place: bool = False,
    on_progress: Progress = no_progress,
) -> Report:
    """Executes a saved (or hand-edited) plan on MODEL and writes OUT.

    plan: a `coterie.json`, its `plan` object, a file or folder holding one, or a dictionary.
    io: how bytes are copied: auto (the first of the others that works), reflink, direct, copy or plain.
    engine, ray_address: local, or ray: bytes are copied by the machines of a Ray cluster (see `prune`).
    in_place: MODEL's files become OUT's (see `prune`).
    recorded: further options for the record; `coterie.saving.apply`, the public one, has some.
    Raises: CoterieError when plan and model do not fit, or OUT cannot be written; then nothing is written.
    """
    clock, read, where = Stopwatch(), read_plan(plan), Engine(engine, ray_address)
    options = {"plan": str(plan) if not isinstance(plan, dict) else "(given as an object)", **(recorded or {})}
    if in_place:
        check_in_place(io=io, engine=engine, overwrite=overwrite)
        if resume and not dry_run and (report := went_on(Path(out), "apply", options, model, clock, on_progress)):
            return report
    if command_of(plan) == "recover":
        raise CoterieError("plan: of `coterie recover`, whose training no plan holds; give the condensed model's own")
    if read.sparsity:
        raise CoterieError(
            f"plan: layer {next(iter(read.sparsity))!r} records zeros inside the experts, which `coterie sparsify` or "
            "`coterie stun` make from data; to keep only the choice of experts, delete the `sparsity` entries"
        )
    return execute(
        converted(Model.open(model), read.converted), read, Path(out), command="apply", path=model,
        options=options, clock=clock, dry_run=dry_run, resume=resume, overwrite=overwrite, io=io, engine=where,
        in_place=in_place, on_progress=on_progress,
    )  # fmt: skip


def execute(
    model: Model,
    plan: Plan,
    out: Path,
    *,
    command: str,
    path: str | Path,
    options: dict[str, Any],
    clock: Stopwatch,
    warnings: tuple[str, ...] = (),
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    io: str = "auto",
    engine: Engine | None = None,
    in_place: bool = False,
    on_progress: Progress = no_progress,
    prepare: Prepare | None = None,
    findings: dict[str, Any] | None = None,
) -> Report:
    """Checks the plan against the checkpoint, writes OUT (unless dry_run), and reports.

    findings: what the decision measured, for the report.
    prepare: given the model as planned, checks everything and returns what changes its weights once they are written.
    engine: where units of work run; not part of what a resume must repeat, since the bytes are the same.
    in_place: MODEL's files become OUT's (`in_place.py`).
    """
    checkpoint, engine = model.checkpoint, engine or Engine()
    check_io(io)
    check_out(out, checkpoint.path, resume=resume, overwrite=overwrite)
    check_plan(model, plan)
    if routed := [block.key for block, _ in routed_blocks(model, plan)]:
        from coterie.loading import check_routable

        check_routable(checkpoint, routed)
        plan = sealed(model, plan)
    outputs = plan_outputs(model, plan)
    numbers, notes = _numbers(model, plan, outputs), [*warnings, *left_behind(checkpoint)]
    view = planned(model, plan, outputs) if prepare else model
    fill = prepare(view) if prepare else None
    report = Report(
        command=command,
        options=options,
        # A dry run reads headers and routers only; the fingerprint reads a few blocks of every shard.
        source={"path": str(path), "hash": None if dry_run else checkpoint.hash},
        plan=plan.as_dict(),
        report={
            **numbers,
            **clock.read(),
            "cold_experts": [],
            "warnings": notes,
            "dry_run": dry_run,
            **(findings or {}),
        },
        versions=versions(),
    )
    if in_place:
        recipe = Recipe.of(checkpoint, outputs, report, out)
        notes.append(recipe.note)
        if not dry_run:
            small = partial(_write_small, checkpoint=checkpoint, config=patched_config(model, plan))
            return consume(recipe, out, clock, resume=resume, prepare=small, on_progress=on_progress)
    if dry_run:
        return report
    identity = {"command": command, "options": options, "plan": report.plan, "source": checkpoint.hash}
    if resume and out.exists() and not partial_of(out).exists():
        return finished(out, report)
    if fill:
        outputs = with_holes(outputs, view)
    with engine.connected(), Writer(out, identity, resume=resume, io=io, replace=overwrite) as writer:
        with engine.opened(writer.partial):
            if engine.spread:
                writer.move = mover(engine, writer.copier, root(checkpoint))
            write(writer, checkpoint, outputs, patched_config(model, plan), on_progress)
            filled = fill(writer) if fill else None
        report.report["io"] = writer.io
        notes += [*writer.copier.notes, *engine.notes]
        if engine.spread:
            report.report["engine"] = engine.summary
        if filled:
            report.plan.update(replace(plan, sparsity=filled.sparsity).as_dict())
            report.report.update(filled.report | _numbers(model, plan, outputs, filled.zeros))
            notes += filled.notes
        report.report.update(clock.read())
        writer.text("coterie.json", to_json(report.as_dict()))
        writer.text("README.md", model_card(checkpoint.path.name, report))
        writer.finish({s: {o.name: o for o in os} for s, os in outputs.items()}, checkpoint.indexed)
    return report


@dataclass(frozen=True)
class Filled:
    """What became of the weights: shares of zeros by layer and role, zeros by the report's bases, and more for it."""

    sparsity: dict[str, dict[str, float]]
    zeros: dict[str, int]  # by the bases of `report.count`
    report: dict[str, Any]
    notes: list[str]


Fill = Callable[[Writer], Filled]
Prepare = Callable[[Model], Fill]


def planned(model: Model, plan: Plan, outputs: dict[str, list[Output]]) -> Model:
    """The model that the plan makes, to read from as if it had been written."""
    return find_blocks(view(model.checkpoint, outputs, patched_config(model, plan)), model.family)


def with_holes(outputs: dict[str, list[Output]], view: Model) -> dict[str, list[Output]]:
    """The outputs with the main layers' expert matrices left open, to be filled by `Writer.put`."""
    weights = set(prunable(view))
    return {
        shard: [replace(o, parts=(Hole(o.num_bytes),)) if o.name in weights else o for o in group]
        for shard, group in outputs.items()
    }


def prunable(model: Model) -> list[str]:
    """The tensors that hold the expert matrices of the ordinary layers."""
    return [name for block in model.main for name in expert_weights(model.checkpoint, block)]


def finished(out: Path, asked: Report) -> Report:
    """The report of a complete OUT, if it is what was asked for; then what a killed run left in it goes."""
    found = load_json(out / "coterie.json")
    wanted = {key: value for key, value in asked.as_dict().items() if key in ("command", "options", "plan")}
    same = wanted == {key: _without_zeros(found.get(key)) if key == "plan" else found.get(key) for key in wanted}
    record = {key: found[key] for key in ("source", "report", "versions") if isinstance(found.get(key), dict)}
    if not same or len(record) < 3 or record["source"].get("hash") != asked.source["hash"]:
        raise CoterieError(f"{out}: is complete, but was made with another source, plan or option; choose another OUT")
    if not _readable(record["report"], asked.report):
        raise CoterieError(f"{out / 'coterie.json'}: its report is damaged; start anew with --overwrite")
    tidy(out)
    return Report(asked.command, asked.options, plan=found["plan"], **record)


def _readable(found: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether a recorded report holds, in kind, what is shown of one."""
    shown = ("before", "after", "sparsity", "seconds", "peak_rss_bytes", "cold_experts", "warnings")
    kurtosis = found.get("kurtosis", {})
    if type(found.get("expert_zeros", 0)) is not int or not isinstance(kurtosis, dict):
        return False
    numbers = all(isinstance(value, int | float | None) for value in kurtosis.values())
    return numbers and all(_alike(found.get(key), asked[key]) for key in shown)


def _alike(found: Any, asked: Any) -> bool:
    if isinstance(asked, dict):
        return isinstance(found, dict) and all(_alike(found.get(key), value) for key, value in asked.items())
    if isinstance(asked, int | float):
        return isinstance(found, int | float)
    return type(found) is type(asked)


def _without_zeros(plan: Any) -> Any:
    """A recorded plan as it was before weights were zeroed."""
    try:
        return replace(read_plan(plan), sparsity={}).as_dict() if isinstance(plan, dict) else None
    except CoterieError:
        return None


def write(
    writer: Writer,
    checkpoint: Checkpoint,
    outputs: dict[str, list[Output]],
    config: dict[str, Any],
    on_progress: Progress,
) -> None:
    writer.begin(root(checkpoint), outputs)
    total, done = sum(map(num_copied, outputs.values())), 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        on_progress("writing", done, total)

    for shard, tensors in outputs.items():
        writer.shard(shard, tensors, checkpoint.metadata[shard], checkpoint, advance)
    _write_small(writer, checkpoint, config)


def _write_small(writer: Writer, checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    """config.json, and the files that travel along."""
    writer.text("config.json", to_json(config))
    for path in checkpoint.other_files():
        if _travels(path):
            writer.copy(path)


def _travels(path: Path) -> bool:
    """Tokenizer, generation config, chat template and licence travel; code, pickles and old cards do not."""
    if path.name in OURS or path.name.endswith(".index.json") or leads_outside(path):
        return False
    return path.suffix in COPIED_SUFFIXES or path.name.upper().startswith(COPIED_NAMES)


def left_behind(checkpoint: Checkpoint) -> list[str]:
    """Files that do not travel and that somebody might miss."""
    for path in filter(_travels, checkpoint.other_files()):
        if path.stat().st_size > MAX_COPIED:
            size = f"{path.stat().st_size:,} bytes"
            raise CoterieError(
                f"{path}: {size} beside the weights, which would be copied; expected at most {MAX_COPIED:,}"
            )
    names = [p.name for p in checkpoint.other_files() if not _travels(p) and p.name not in OURS]
    missed = [n for n in names if n.endswith((".py", ".safetensors", *PICKLES)) or leads_outside(checkpoint.path / n)]
    missed += [f"{p.name}/" for p in sorted(checkpoint.path.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    kinds = "code, pickles, unused weights, subfolders and links out of the folder never are"
    return [f"not copied ({kinds}): {', '.join(missed)}"] if missed else []


def check_plan(model: Model, plan: Plan) -> None:
    """Everything that would fail at load, or load and compute something else. Raises: CoterieError."""
    checkpoint, config = model.checkpoint, model.checkpoint.config
    known = {(b.key, b.attention) for b in model.moe}
    for keys, attention in ((plan.layers, False), (plan.attention, True)):
        for key in keys:
            if (key, attention) not in known:
                kind = "attention experts" if attention else "experts"
                raise CoterieError(f"plan: layer {key!r} has no {kind} in {checkpoint.path}")
    check_dense(model, plan)
    check_dropped(model, plan)
    check_routes(model, plan)
    groups, top_k = model.family.groups(config), model.family.num_experts_per_token(config)
    counts = {}
    for block in model.moe:
        choice = plan.choice(block)
        if (block.mtp and plan.drop_mtp) or (block.key in plan.condensed and not block.attention):
            continue
        routed = is_routed(choice, block)  # then the router chooses as before
        counts[block.name] = len(choice.kept) if choice and not routed else block.num_experts
        if choice:
            _check_choice(checkpoint, block, choice, 1 if routed else groups.num_groups)
    for name, num_kept in counts.items():
        check_count(num_kept, top_k, groups, f"plan: {name}")
    if len(set(counts.values())) > 1 and plan.budget.get("layout") != "coterie":
        raise CoterieError(
            f"plan: layers keep different numbers of experts ({min(counts.values())} to {max(counts.values())}), "
            'which no stock config can say; make them equal, or set "layout": "coterie" in the plan\'s budget '
            "(--non-uniform coterie)"
        )


def _check_choice(checkpoint: Checkpoint, block: MoE, choice: Choice, num_groups: int) -> None:
    named = {*choice.kept, *(e for c in choice.clusters for e in c)}
    if max(named) >= block.num_experts:
        raise CoterieError(f"plan: {block.name} names expert {max(named)}, but its ids end at {block.num_experts - 1}")
    size = block.num_experts // num_groups
    per_group = [sum(e // size == g for e in choice.kept) for g in range(num_groups)]
    if len(set(per_group)) > 1:
        raise CoterieError(
            f"plan: {block.name} keeps {per_group} experts in its {num_groups} routing groups; expected equal numbers, "
            "or the router would compute something else"
        )
    if choice.merged:
        for name in [*(n for e in block.experts for n in e.values()), *block.fused, block.router]:
            if checkpoint.tensors[name].dtype not in MERGEABLE:
                raise CoterieError(
                    f"tensor {name!r}: {checkpoint.tensors[name].dtype} weights cannot be averaged; "
                    "dequantise the checkpoint first, or average none (prune: --kappa 0)"
                )


def check_count(num_kept: int, top_k: int, groups: Any, where: str) -> None:
    """Whether a layer can run with this many experts. Raises: CoterieError naming the nearest counts that work."""
    if num_kept < top_k:
        raise CoterieError(f"{where}: keeps {num_kept} experts, but {top_k} are chosen per token; keep at least those")
    if not fits_groups(num_kept, top_k, groups):
        near = sorted(range(1, 4 * num_kept + 8), key=lambda n: abs(n - num_kept))
        works = sorted([n for n in near if n >= top_k and fits_groups(n, top_k, groups)][:2])
        raise CoterieError(
            f"{where}: {num_kept} experts break routing in {groups.num_groups} groups (equal numbers, at least "
            f"{groups.min_per_group} per group, {top_k} within {groups.top_groups} groups); nearest that work: "
            f"{' and '.join(map(str, works))}"
        )


def fits_groups(num_kept: int, top_k: int, groups: Any) -> bool:
    per_group, rest = divmod(num_kept, groups.num_groups)
    return rest == 0 and per_group >= groups.min_per_group and groups.top_groups * per_group >= min(top_k, num_kept)


def plan_outputs(model: Model, plan: Plan) -> dict[str, list[Output]]:
    """What every output shard holds, tensor by tensor, in the source's order. A shard left empty is left out."""
    checkpoint, changed = model.checkpoint, dict[str, Output | None]()
    for block in model.moe:
        choice = plan.choice(block)
        if choice and len(choice.kept) < block.num_experts:
            changed |= block_outputs(checkpoint, block, choice)
    if plan.drop_mtp:
        changed |= dict.fromkeys(mtp_names(model))
    by_name: dict[str, tuple[Output, ...]] = {n: (output,) if output else () for n, output in changed.items()}
    by_name |= dense_outputs(model, plan) | dropped_outputs(model, plan)
    for block, choice in routed_blocks(model, plan):
        if choice.removed == "constant":
            router = whole(checkpoint.tensors[block.router])
            by_name[block.router] = (router, constants_output(checkpoint, block, choice, plan))
    shards: dict[str, list[Output]] = {shard: [] for shard in checkpoint.shards}
    for name, tensor in checkpoint.tensors.items():
        shards[tensor.file] += by_name.get(name, (whole(tensor),))
    return resolved(checkpoint, {shard: outputs for shard, outputs in shards.items() if outputs})


def whole(tensor: Tensor, name: str | None = None) -> Output:
    """The tensor as it is, perhaps under another name."""
    return Output(name or tensor.name, tensor.dtype, tensor.shape, (Run(tensor.file, tensor.start, tensor.end),))


def block_outputs(checkpoint: Checkpoint, block: MoE, choice: Choice) -> dict[str, Output | None]:
    """Source name -> what becomes of it (None: dropped), for every tensor of the block that changes."""
    tensors = checkpoint.tensors
    result: dict[str, Output | None] = {}
    index = {e: i for i, e in enumerate(choice.kept)}
    members = Members(checkpoint, block, choice)
    for e, names in enumerate(block.experts):
        for key, name in names.items():
            if e not in index:
                result[name] = None
                continue
            renamed = f"{block.prefix}{block.layout.experts}{index[e]}.{key}"
            if _merged_cluster(choice, index[e]):
                part = _mean(tensors[name], partial(members.numbered, index[e], key), _shares(choice, index[e]))
                result[name] = Output(renamed, tensors[name].dtype, tensors[name].shape, (part,))
            else:
                result[name] = whole(tensors[name], renamed)
    routing = () if is_routed(choice, block) else (block.router, *block.rows)
    for name in (*block.fused, *routing):
        fused = members if name in block.fused else None
        result[name] = sliced(checkpoint, tensors[name], choice, block.num_experts, fused)
    for name in block.tables if routing else ():
        result[name] = _table(checkpoint, block, tensors[name], choice)
    return result


def _merged_cluster(choice: Choice, i: int) -> tuple[int, ...]:
    """The experts averaged into kept expert i; empty where it stays itself."""
    return choice.clusters[i] if choice.merged and len(choice.clusters[i]) > 1 else ()


def _shares(choice: Choice, i: int) -> tuple[float, ...]:
    return choice.shares[i] if choice.shares else ()


def _mean(
    tensor: Tensor, values: Callable[[], Iterable[Any]], shares: tuple[float, ...], num_bytes: int | None = None
) -> Made:
    """A mean accumulated in float64 and rounded once, computed when it is written."""

    def make() -> bytes:
        from coterie.numerics import encode

        return encode(mean(values(), shares), tensor.dtype, tensor.name)

    return Made(tensor.num_bytes if num_bytes is None else num_bytes, make)


def sliced(
    checkpoint: Checkpoint, tensor: Tensor, choice: Choice, num_experts: int, fused: Members | None = None
) -> Output:
    """A tensor that holds all experts along one axis, cut to the kept ones: whole byte ranges, since every axis
    before it has length 1 (fused tensors, given the block's members: the first axis, E blocks of rows)."""
    axis = 0 if fused else expert_axis(tensor.shape, num_experts)
    assert axis is not None
    rows = tensor.shape[axis] // num_experts
    size, rest = divmod(tensor.num_bytes, num_experts)
    if rest:
        raise CoterieError(
            f"tensor {tensor.name!r}: {tensor.num_bytes} bytes do not divide among {num_experts} experts"
        )

    def values(e: int) -> Any:
        from coterie.numerics import decode

        return decode(checkpoint.raw(tensor.name, e * size, size), tensor.dtype, tensor.name)

    parts: list[Run | Made] = []
    for i, e in enumerate(choice.kept):
        cluster = _merged_cluster(choice, i)
        if cluster:
            each = partial(fused.fused, i, tensor.name) if fused else partial(map, values, cluster)
            parts.append(_mean(tensor, each, _shares(choice, i), size))
        else:
            parts.append(Run(tensor.file, tensor.start + e * size, tensor.start + (e + 1) * size))
    shape = (*tensor.shape[:axis], len(choice.kept) * rows, *tensor.shape[axis + 1 :])
    return Output(tensor.name, tensor.dtype, shape, tuple(parts))


def _table(checkpoint: Checkpoint, block: MoE, tensor: Tensor, choice: Choice) -> Output:
    """Token -> expert ids, with a dropped id replaced by its cluster's representative, or (where the plan has no
    clusters) by the kept expert with the nearest router row."""
    if tensor.dtype not in ("I64", "I32", "I16", "I8", "U8"):
        raise CoterieError(f"tensor {tensor.name!r}: a table of expert ids as {tensor.dtype}; expected integers")

    def make() -> bytes:
        import numpy as np

        ids = checkpoint.read(tensor.name)
        if ids.size and (ids.min() < 0 or ids.max() >= block.num_experts):
            raise CoterieError(f"tensor {tensor.name!r}: names expert {ids.max()}, but {block.num_experts} exist")
        index = choice.stand_ins(block.num_experts)
        router = checkpoint.read(block.router).astype(np.float64)
        for e in set(range(block.num_experts)) - set(index):
            index[e] = int(np.linalg.norm(router[list(choice.kept)] - router[e], axis=1).argmin())
        table = np.array([index[e] for e in range(block.num_experts)], dtype=ids.dtype)
        return table[ids].tobytes()

    return Output(tensor.name, tensor.dtype, tensor.shape, (Made(tensor.num_bytes, make),))


def patched_config(model: Model, plan: Plan) -> dict[str, Any]:
    """config.json with the new expert count under the keys the source used, and everything else as it was."""
    config = copy.deepcopy(model.checkpoint.config)
    kept = {
        b.key: len(c.kept) if (c := plan.choice(b)) and not is_routed(c, b) else b.num_experts
        for b in model.moe
        if not b.attention
    }
    if plan.drop_mtp:
        mtp = {b.key for b in model.moe if b.mtp}
        kept = {key: n for key, n in kept.items() if key not in mtp}
        for key, holder, _ in list(lookup(config, model.family.mtp_count)):
            holder[key] = 0
    kept = {key: n for key, n in kept.items() if key not in plan.condensed}
    for key, holder, value in list(lookup(config, model.family.count)):
        if value is not None and kept:
            holder[key.rpartition(".")[2]] = max(kept.values())
    if len(set(kept.values())) > 1:
        # Loud in stock software: an unknown model type, not a model with random weights.
        model_type = next(v for _, _, v in lookup(config, ("coterie.model_type", "model_type")) if isinstance(v, str))
        config["coterie"] = {"format": 1, "model_type": model_type, "num_experts": kept}
        config["model_type"] = "coterie"
    say_routes(config, model, plan)
    patch_dense(config, model, plan)
    patch_dropped(config, model, plan)
    return config


def _numbers(
    model: Model, plan: Plan, outputs: dict[str, list[Output]], zeros: dict[str, int] | None = None
) -> dict[str, Any]:
    """Sizes before and after, and the share removed or zero on all three bases."""
    after = [Tensor(o.name, o.dtype, o.shape, s, 0, o.num_bytes) for s, tensors in outputs.items() for o in tensors]
    checkpoint, roles = model.checkpoint, dict(model.roles)
    for block in model.moe:  # renumbered experts keep their role
        below = f"{block.prefix}{block.layout.experts}"
        roles |= {f"{below}{i}.{key}": "expert" for i, e in enumerate(block.experts) for key in e}
        roles[constants_name(block)] = "constant"
    counts = [count(list(checkpoint.tensors.values()), model.roles), count(after, roles)]
    for block in model.main:  # what stays, always on, is neither removed nor zero
        if block.key in plan.condensed:
            routed = sum(checkpoint.tensors[n].num_parameters for n in expert_names(block))
            counts[1]["experts"] += routed // block.num_experts * len(plan.condensed[block.key].experts)
    main = [b for b in model.main if int(b.key) not in plan.dropped]
    kept = {b.key: len(c.kept) if (c := plan.choice(b)) else b.num_experts for b in main if b.key not in plan.condensed}
    return {
        "before": {
            "parameters": root(checkpoint).num_parameters,
            "bytes": root(checkpoint).num_bytes,
            "experts": _one_or_all({b.key: b.num_experts for b in model.main}),
        },
        "after": {
            "parameters": counts[1]["all"],
            "bytes": sum(t.num_bytes for t in after),
            "experts": _one_or_all(kept),
        },
        "sparsity": removed_shares(counts[0], {base: n - (zeros or {}).get(base, 0) for base, n in counts[1].items()}),
    }


def _one_or_all(counts: dict[str, int]) -> int | dict[str, int]:
    """One number where all layers agree, else the number of each."""
    return next(iter(counts.values()), 0) if len(set(counts.values())) <= 1 else counts
