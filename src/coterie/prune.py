"""`coterie prune`: choose the experts that stay, write the plan, execute it."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from coterie.apply import check_count, execute, fits_groups
from coterie.errors import CoterieError
from coterie.experts import Layer, read_layer
from coterie.family import Groups
from coterie.layer import Model, MoE, mtp_names
from coterie.methods import prune as methods
from coterie.methods.prune import stun
from coterie.plan import Choice, Plan
from coterie.report import Progress, Report, Stopwatch, no_progress

CHOICES = {
    "budget": ("uniform", "global"),
    "linkage": ("complete", "official"),
    "distance": ("frobenius", "raw"),
    "non_uniform": ("round", "refuse", "coterie"),
}


@dataclass(frozen=True)
class Options:
    """What `prune` was asked for, with its defaults; recorded in coterie.json."""

    method: str = "stun"
    ratio: float | None = None
    experts: int | None = None
    budget: str = "uniform"
    linkage: str = "complete"
    distance: str = "frobenius"
    kappa: int = stun.MERGE_BELOW
    min_experts: int | None = None
    non_uniform: str = "round"
    threshold: float = 0.5
    seed: int = 0
    drop_mtp: bool = False


def prune(
    model: str | Path,
    out: str | Path,
    *,
    method: str = "stun",
    ratio: float | None = None,
    experts: int | None = None,
    budget: str = "uniform",
    linkage: str = "complete",
    distance: str = "frobenius",
    kappa: int = stun.MERGE_BELOW,
    min_experts: int | None = None,
    non_uniform: str = "round",
    threshold: float = 0.5,
    seed: int = 0,
    drop_mtp: bool = False,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: Progress = no_progress,
) -> Report:
    """Removes `floor(ratio * E)` routed experts per layer (default 0.25), or all but `experts`, by a method.

    method: stun, random, first, router-norm, weight-norm. The rest but `seed` shapes stun:
    budget: uniform (the same count everywhere) or global (one height cuts all layers' dendrograms).
    linkage: complete, or official (the published program's rules); threshold is where its search starts.
    distance: router rows' distance over ||W||_F (frobenius) or as it is (raw).
    kappa: a layer left with fewer clusters than this gets their means instead of representatives.
    min_experts: no layer keeps fewer under a global budget (default: top-k).
    non_uniform: what becomes of unequal counts: round, refuse, or write them in our own layout (coterie).
    drop_mtp: leave multi-token-prediction layers out instead of cutting them like the others.
    dry_run: decide and report from headers and routers alone; nothing is written.
    Raises: CoterieError, before anything is written.
    """
    clock = Stopwatch()
    options = Options(
        method, ratio, experts, budget, linkage, distance, kappa, min_experts, non_uniform, threshold, seed, drop_mtp
    )
    check_options(options)
    source = Model.open(model)
    plan, warnings = make_plan(source, options, dry_run=dry_run, on_progress=on_progress)
    return execute(
        source, plan, Path(out), command="prune", path=model,
        options=vars(options).copy(), clock=clock, warnings=warnings,
        dry_run=dry_run, resume=resume, overwrite=overwrite, on_progress=on_progress,
    )  # fmt: skip


def check_options(options: Options) -> None:
    """Raises: CoterieError for a value out of its range, or for two options that contradict or ignore each other."""
    methods.load(options.method)
    for name, allowed in CHOICES.items():
        if getattr(options, name) not in allowed:
            flag = f"--{name.replace('_', '-')}"
            raise CoterieError(f"{flag} {getattr(options, name)!r}: unknown; expected one of {', '.join(allowed)}")
    if options.ratio is not None and options.experts is not None:
        raise CoterieError("--ratio and --experts say the same thing twice; give one of them")
    if options.ratio is not None and not 0 <= options.ratio < 1:
        raise CoterieError(f"--ratio {options.ratio}: the share of experts to remove must be in [0, 1)")
    if options.kappa < 0:
        raise CoterieError(f"--kappa {options.kappa}: expected a number of clusters, 0 or more")
    if options.min_experts is not None and options.min_experts < 1:
        raise CoterieError(f"--min-experts {options.min_experts}: expected at least 1")
    default = Options()
    shaping = ("budget", "linkage", "distance", "kappa", "min_experts", "non_uniform", "threshold")
    given = [n for n in shaping if getattr(options, n) != getattr(default, n)]
    if options.method != "stun" and given:
        flag = f"--{given[0].replace('_', '-')}"
        raise CoterieError(f"{flag} shapes the method stun and would be ignored by {options.method}")
    if options.min_experts is not None and options.budget != "global":
        raise CoterieError("--min-experts is the floor of a global budget and would be ignored; add --budget global")
    if options.non_uniform != default.non_uniform and options.budget != "global":
        raise CoterieError("--non-uniform is about a global budget and would be ignored; add --budget global")
    if options.threshold != default.threshold and (options.linkage, options.budget) != ("official", "global"):
        raise CoterieError("--threshold would be ignored; it belongs to --linkage official --budget global")
    if options.seed != default.seed and options.method != "random":
        raise CoterieError(f"--seed is of the method random and would be ignored by {options.method}")
    if options.min_experts is not None and options.linkage == "official":
        raise CoterieError("--min-experts: the published program knows no floor; use --linkage complete")


def num_kept(options: Options, num_experts: int) -> int:
    """The uniform count: E - floor(ratio * E), or the count asked for."""
    if options.experts is not None:
        if not 0 < options.experts <= num_experts:
            raise CoterieError(f"--experts {options.experts}: the model has {num_experts}; expected 1 to {num_experts}")
        return options.experts
    ratio = Decimal("0.25") if options.ratio is None else Decimal(str(options.ratio))
    return num_experts - int(ratio * num_experts)


def make_plan(
    model: Model, options: Options, *, dry_run: bool = False, on_progress: Progress = no_progress
) -> tuple[Plan, tuple[str, ...]]:
    """The plan, and what should be said aloud about it. Reads routers, and weights only where a method needs them."""
    family, config = model.family, model.checkpoint.config
    groups, top_k, total = family.groups(config), family.num_experts_per_token(config), family.num_experts(config)
    uniform = num_kept(options, total)
    asked = f"--experts {uniform}" if options.experts else f"--ratio {0.25 if options.ratio is None else options.ratio}"
    check_count(uniform, top_k, groups, asked)
    if options.drop_mtp and not mtp_names(model):
        raise CoterieError("--drop-mtp: the model has no multi-token-prediction layers to leave out")
    chosen = [b for b in model.moe if not (b.mtp and options.drop_mtp)]
    small = min(chosen, key=lambda b: b.num_experts)
    if small.num_experts < uniform:
        raise CoterieError(f"{asked}: keeps {uniform} experts, but {small.name} has {small.num_experts}; keep fewer")
    layers = {b: read_layer(model.checkpoint, b, groups.num_groups) for b in chosen}
    budget: dict[str, Any] = {"kind": options.budget, "experts": uniform}
    if options.method == "stun":
        floor = _floor(options, uniform, top_k, groups)
        clusters, found = _cluster(layers, options, uniform, floor, groups.num_groups)
        choices = _representatives(layers, clusters, options.kappa, dry_run, on_progress)
        budget |= found
    else:
        choices = _scored(layers, options, uniform, groups.num_groups, on_progress)
    plan = Plan(
        layers={b.key: c for b, c in choices.items() if not b.attention},
        attention={b.key: c for b, c in choices.items() if b.attention},
        budget=budget,
        drop_mtp=options.drop_mtp,
    )
    warnings = _awkward(uniform, total)
    if any(b.mtp for b in model.moe):
        fate = "left out" if options.drop_mtp else f"cut to {uniform} experts by the same rule"
        warnings = (*warnings, f"multi-token-prediction layers are {fate}")
    return plan, warnings


def _floor(options: Options, uniform: int, top_k: int, groups: Groups) -> int:
    """The fewest experts that a global budget may leave in a layer."""
    least = top_k if options.min_experts is None else options.min_experts
    if least < top_k:
        raise CoterieError(f"--min-experts {least}: {top_k} are chosen per token; ask for at least those")
    floor = next((n for n in range(least, uniform + 1) if fits_groups(n, top_k, groups)), None)
    if floor is None:
        raise CoterieError(f"--min-experts {least}: the budget keeps {uniform} experts on average; ask for fewer")
    return floor


def _awkward(count: int, before: int) -> tuple[str, ...]:
    if count % 8 and count != before:
        return (f"{count} experts is not a multiple of 8: some serving kernels and expert parallelism want that",)
    return ()


def _cluster(
    layers: dict[MoE, Layer], options: Options, uniform: int, floor: int, size: int
) -> tuple[dict[MoE, stun.Clusters], dict[str, Any]]:
    """Each block's clusters under the budget, and what the budget came to. `size` is the number of routing groups."""
    matrices = {b: _distance(b, layer, options) for b, layer in layers.items()}
    if options.linkage == "official":
        return _official(matrices, options, uniform, size)
    trees = {b: [stun.dendrogram(d) for d in _per_group(m, size)] for b, m in matrices.items()}
    counts = dict.fromkeys(layers, uniform)
    heights = {b: [sum(hs) for hs in zip(*(t.heights for t in ts), strict=True)] for b, ts in trees.items()}
    found: dict[str, Any] = {"cost": _cost(heights, counts, size)}
    if options.budget == "global":
        main = [b for b in layers if not b.mtp]
        merges = [heights[b] for b in main]
        limits = [(len(layers[b].router) - floor) // size for b in main]
        wanted = sum(len(layers[b].router) - uniform for b in main) // size
        cut = stun.cut_globally(merges, wanted, limits)
        asked = {b: len(layers[b].router) - n * size for b, n in zip(main, cut, strict=True)}
        found |= {"global": {b.name: n for b, n in asked.items()}, "global_cost": _cost(heights, asked, size)}
        counts |= _settle(asked, options, found)
    clusters = {b: _join(t, counts[b] // size, len(layers[b].router) // size) for b, t in trees.items()}
    return clusters, found


def _settle(asked: dict[MoE, int], options: Options, found: dict[str, Any]) -> dict[MoE, int]:
    """What becomes of unequal counts. Stock configs hold one count."""
    if len(set(asked.values())) == 1 or options.non_uniform == "round":
        found["rounded"] = len(set(asked.values())) > 1
        return {}
    if options.non_uniform == "refuse":
        low, high = min(asked.values()), max(asked.values())
        raise CoterieError(
            f"--non-uniform refuse: the budget keeps {low} to {high} experts; stock configs hold one count"
        )
    if any(b.attention for b in asked):
        raise CoterieError("--non-uniform coterie: attention experts share the config's one count; use round")
    found["layout"] = "coterie"
    return asked


def _cost(heights: dict[MoE, list[float]], counts: dict[MoE, int], size: int) -> float:
    """The sum of the heights of all merges made: what the clustering gives up."""
    return float(sum(sum(heights[b][: len(heights[b]) + 1 - n // size]) for b, n in counts.items()))


def _distance(block: MoE, layer: Layer, options: Options) -> Any:
    normalise = options.distance == "frobenius"
    if options.linkage == "official":
        return stun.official_distances(
            layer.router, layer.experts.checkpoint.tensors[block.router].dtype, normalise=normalise
        )
    return stun.distances(layer.router, normalise=normalise)


def _per_group(matrix: Any, num_groups: int) -> list[Any]:
    """The diagonal blocks: experts may only merge inside their routing group."""
    size = len(matrix) // num_groups
    return [matrix[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(num_groups)]


def _join(trees: list[stun.Dendrogram], per_group: int, size: int) -> stun.Clusters:
    return [[g * size + e for e in c] for g, tree in enumerate(trees) for c in tree.cut(per_group)]


def _official(
    matrices: dict[MoE, Any], options: Options, uniform: int, num_groups: int
) -> tuple[dict[MoE, stun.Clusters], dict[str, Any]]:
    """The published program: single linkage at a fixed count, or its threshold search for a total."""
    import numpy as np

    found: dict[str, Any] = {}
    searched: dict[MoE, stun.Clusters] = {}
    if options.budget == "global":
        if num_groups > 1:
            raise CoterieError("--linkage official --budget global knows no routing groups; use --linkage complete")
        main = [b for b in matrices if not b.mtp]
        lists = stun.official_global([matrices[b] for b in main], uniform * len(main), options.threshold)
        asked = {b: len(c) for b, c in zip(main, lists, strict=True)}
        found["global"] = {b.name: n for b, n in asked.items()}
        _settle(asked, options, found)
        searched = {} if found.get("rounded") else dict(zip(main, lists, strict=True))
    clusters = {}
    for block, matrix in matrices.items():
        size, parts = len(matrix) // num_groups, _per_group(matrix, num_groups)
        merges = size - uniform // num_groups
        clusters[block] = [
            [g * size + e for e in c] for g, m in enumerate(parts) for c in stun.official_clusters(m, np.inf, merges)
        ]
    return clusters | searched, found


def _representatives(
    layers: dict[MoE, Layer],
    clusters: dict[MoE, stun.Clusters],
    kappa: int,
    dry_run: bool,
    on_progress: Progress,
) -> dict[MoE, Choice]:
    choices = {}
    for done, (block, layer) in enumerate(layers.items()):
        choices[block] = _choose(layer, clusters[block], kappa, dry_run)
        on_progress("choosing representatives", done + 1, len(layers))
    return choices


def _choose(layer: Layer, clusters: stun.Clusters, kappa: int, dry_run: bool) -> Choice:
    """One representative per cluster, ascending; means instead where fewer than kappa clusters are left."""
    if dry_run:  # weights stay unread: the tie rule stands in for the nearest to the mean
        kept = [stun.pair_winner(c, layer.router) for c in clusters]
    else:
        kept = [stun.representative(c, layer.experts, layer.router) for c in clusters]
    order = sorted(range(len(kept)), key=kept.__getitem__)
    merged = len(clusters) < kappa and any(len(c) > 1 for c in clusters)
    return Choice(tuple(kept[i] for i in order), tuple(tuple(clusters[i]) for i in order), merged)


def _scored(
    layers: dict[MoE, Layer], options: Options, uniform: int, num_groups: int, on_progress: Progress
) -> dict[MoE, Choice]:
    """The highest scores of each routing group stay; ties go to the lower id."""
    import numpy as np

    method, generator = methods.load(options.method), np.random.default_rng(options.seed)
    choices = {}
    for done, (block, layer) in enumerate(layers.items()):
        scores = np.asarray(method.score(layer, generator), dtype=np.float64).reshape(num_groups, -1)
        size = scores.shape[1]
        best = np.argsort(-scores, axis=1, kind="stable")[:, : uniform // num_groups]
        choices[block] = Choice(tuple(sorted(g * size + int(e) for g, row in enumerate(best) for e in row)))
        on_progress("scoring experts", done + 1, len(layers))
    return choices
