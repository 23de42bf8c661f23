"""What `prune` can be asked for, and what its options demand of each other."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from coterie.errors import CoterieError, check_choice
from coterie.forward.data import calibration_files
from coterie.forward.samples import DATA, Calibration, Dtype
from coterie.methods import prune as methods
from coterie.methods.prune import stun
from coterie.model.stats import parse_weights
from coterie.options import Help, as_text, flag_of, flat

CHOICES = {
    "budget": ("uniform", "global"),
    "linkage": ("complete", "official"),
    "distance": ("frobenius", "raw"),
    "non_uniform": ("round", "refuse", "coterie"),
}
REMOVED = ("remove", "null", "constant")
OURS = (
    "routers keep the rows of removed experts, which no stock config can say: written in a layout that `coterie.load` "
    "reads (--removed remove writes a stock checkpoint)"
)
SHAPING = ("budget", "linkage", "distance", "kappa", "min_experts", "non_uniform", "threshold", "lambda1", "lambda2")
OF_CALIBRATION = ("data", "samples", "seq_len", "dtype")
READ_BY = {  # option: the NEEDS of the methods that read it
    "stats": ("clusters", "stats", "outputs", "base"),
    "weights": ("clusters", "stats", "outputs"),
    "no_guard": ("clusters", "stats", "outputs", "base"),
    "base": ("base",),
    **dict.fromkeys(OF_CALIBRATION, ("clusters", "stats", "outputs")),
}


Lambda1 = Annotated[float, Help("Weight of the router rows' distance.")]
Lambda2 = Annotated[float, Help("Weight of co-activation; needs --stats.")]
Statistics = Annotated[
    str | None,
    Help("What `coterie collect` measured on MODEL: experts are chosen by it.", "STATS", given=Path, read=as_text),
]  # fmt: skip
Weights = Annotated[  # of domains; those not named count 1
    dict[str, float],
    Help("How often each domain counts [default: 1 each].", "NAME=W,...", given=str, read=parse_weights, default=None),
]  # fmt: skip


def check_weights(weights: Mapping[str, float], data: Collection[str]) -> None:
    """Raises: CoterieError for a domain that the data, where they are given, do not have."""
    absent = set(weights) - set(data) if data else set()
    if absent:
        raise CoterieError(f"--weights: domain {sorted(absent)[0]!r} is not in the data: {', '.join(data)}")


def spelled(weights: dict[str, float]) -> str | None:
    """Weights of domains as --weights has them; None where none is given."""
    return ",".join(f"{name}={weight}" for name, weight in weights.items()) or None


# Options come first: a dictionary's files are looked at when they are read.
LATER = replace(
    DATA, text="What experts do on it decides: text, JSON, Parquet, a folder, or hub:OWNER/NAME; repeatable.",
    read=lambda data: data if isinstance(data, dict) else calibration_files(data),
)  # fmt: skip
NoGuard = Annotated[bool, Help("Let experts with extreme outputs be removed too.")]


@dataclass(frozen=True)
class Remaining:
    """How many experts of a layer remain: all but a share of them (None: a quarter), or a count."""

    ratio: Annotated[float | None, Help("Share of experts to remove per layer [default: 0.25].")] = None
    experts: Annotated[int | None, Help("Experts to keep per layer, instead of --ratio.")] = None

    def check(self) -> None:
        """Raises: CoterieError where both are given, or the share is none."""
        if self.ratio is not None and self.experts is not None:
            raise CoterieError("--ratio and --experts say the same thing twice; give one of them")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise CoterieError(f"--ratio {self.ratio}: the share of experts to remove must be in [0, 1)")


@dataclass(frozen=True)
class Pruning:
    """What `prune` was asked for, with its defaults; recorded in coterie.json."""

    method: Annotated[
        str | None,
        Help(
            f"How experts are chosen: {', '.join(methods.names())} [default: reap with --data or --stats, else stun]."
        ),
    ] = None
    remaining: Remaining = field(default_factory=Remaining)
    budget: Annotated[str, Help("uniform: every layer alike; global: one height cuts all.")] = "uniform"
    linkage: Annotated[str, Help("complete, or official: the published program's rules.")] = "complete"
    distance: Annotated[str, Help("frobenius: over the router's norm; or raw.")] = "frobenius"
    kappa: Annotated[int, Help("Average clusters in layers left with fewer than this many.")] = stun.MERGE_BELOW
    min_experts: Annotated[int | None, Help("Floor of a global budget [default: top-k].")] = None
    non_uniform: Annotated[str, Help("Unequal counts: round, refuse, or coterie (our layout).")] = "round"
    threshold: Annotated[float, Help("Where the official global search starts.")] = 0.5
    seed: Annotated[int, Help("Which passages of the data are drawn; or of the method random.")] = 0
    drop_mtp: Annotated[bool, Help("Leave multi-token-prediction layers out.")] = False
    lambda1: Lambda1 = 1.0
    lambda2: Lambda2 = 0.0
    stats: Statistics = None
    weights: Weights = field(default_factory=dict)
    no_guard: NoGuard = False
    base: Annotated[
        str | None, Help("The checkpoint before training, for router-norm-change.", "MODEL0", read=as_text)
    ] = None
    calibration: Annotated[Calibration, {"data": LATER}] = field(default_factory=Calibration)
    dtype: Dtype = "auto"
    removed: Annotated[
        str | None,
        Help(
            "What becomes of removed experts' router rows: remove; or, in our layout, null or constant: they stay, and "
            "give zero or a mean output [default: remove; mone: constant]."
        ),
    ] = None

    @property
    def criterion(self) -> str:
        """The method asked for; else reap where data say what experts do, unless an option shapes stun."""
        if self.method is not None:
            return self.method
        return "reap" if self.measured and not self.shaping else "stun"

    @property
    def why(self) -> str:
        """What to say of a method that was not asked for; nothing where it was."""
        if self.method is not None:
            return ""
        if self.criterion == "reap":
            return f"no --method: reap decides, by what experts do on {self.measured}"
        if self.shaping:
            return f"no --method: stun decides, which {flag_of(self.shaping[0])} shapes"
        return "no --method, no data: stun decides, by router rows alone; with --data reap would, which keeps more"

    @property
    def shaping(self) -> list[str]:
        """The options given that only stun reads."""
        default = Pruning()
        return [name for name in SHAPING if getattr(self, name) != getattr(default, name)]

    @property
    def measured(self) -> str:
        """The option that says what experts do on data; nothing where none does."""
        return "--stats" if self.stats else "--data" if self.calibration.data else ""

    @property
    def calibrates(self) -> bool:
        """Whether the model is run on data to decide: always to compare outputs, else in place of statistics."""
        return self.needs == "outputs" or (self.needs in READ_BY["data"] and self.measured == "--data")

    @property
    def has_stats(self) -> bool:
        """Whether there are statistics: given, or measured from the data first."""
        return bool(self.stats) or (self.calibrates and self.needs != "outputs")

    @property
    def fate(self) -> str:
        """What becomes of removed experts' router rows: asked for, or the method's own way."""
        return self.removed or str(getattr(methods.load(self.criterion), "REMOVED", "remove"))

    @property
    def needs(self) -> str:
        """What the method decides from, as `methods/prune/__init__.py` has it."""
        return methods.load(self.criterion).NEEDS

    def record(self) -> dict[str, Any]:
        """The options as spelled on the command line, without those that only other kinds of methods read."""
        others = [*([] if self.needs == "base" else ["base"]), *([] if self.calibrates else OF_CALIBRATION)]
        found = flat(self) | {"weights": spelled(self.weights), "data": self.calibration.named}
        found |= {"method": self.criterion, "removed": self.fate}
        return {n: v for n, v in found.items() if n not in others}


def check_options(options: Pruning) -> None:
    """Raises: CoterieError for a value out of its range, or for two options that contradict or ignore each other."""
    methods.load(options.criterion)
    for name, allowed in CHOICES.items():
        check_choice(flag_of(name), getattr(options, name), allowed)
    options.remaining.check()
    if options.kappa < 0:
        raise CoterieError(f"--kappa {options.kappa}: expected a number of clusters, 0 or more")
    if options.min_experts is not None and options.min_experts < 1:
        raise CoterieError(f"--min-experts {options.min_experts}: expected at least 1")
    default, readers = Pruning(), ", ".join(methods.names("clusters"))
    if options.needs != "clusters" and (given := options.shaping):
        raise CoterieError(
            f"{flag_of(given[0])} shapes the method {readers} and would be ignored by {options.criterion}"
        )
    if options.min_experts is not None and options.budget != "global":
        raise CoterieError("--min-experts is the floor of a global budget and would be ignored; add --budget global")
    if options.non_uniform != default.non_uniform and options.budget != "global":
        raise CoterieError("--non-uniform is about a global budget and would be ignored; add --budget global")
    if options.threshold != default.threshold and (options.linkage, options.budget) != ("official", "global"):
        raise CoterieError("--threshold would be ignored; it belongs to --linkage official --budget global")
    seeded = [name for name in methods.names() if getattr(methods.load(name), "SEEDED", False)]
    if options.seed != default.seed and options.criterion not in seeded and not options.calibrates:
        raise CoterieError(
            f"--seed is of --data and of the method {', '.join(seeded)}, and would be ignored by {options.criterion}"
        )
    if options.min_experts is not None and options.linkage == "official":
        raise CoterieError("--min-experts: the published program knows no floor; use --linkage complete")
    _check_distance(options)
    _check_needs(options)


def _check_needs(options: Pruning) -> None:
    """What a criterion decides from must be given, and nothing else."""
    given, default, method = flat(options), flat(Pruning()), options.criterion
    _check_removed(options)
    for name, needs in READ_BY.items():
        if given[name] != default[name] and options.needs not in needs:
            readers = sorted(methods.names(*needs), key=lambda n: methods.load(n).NEEDS != "clusters")  # those first
            raise CoterieError(f"{flag_of(name)} would be ignored by {method}; it is of {', '.join(readers)}")
    if options.needs == "stats" and not options.measured:
        raise CoterieError(
            f"--method {method} decides by statistics; add --data NAME=FILE, or --stats FILE, which `coterie collect "
            "MODEL FILE` writes"
        )
    unread = [] if options.calibrates else [n for n in OF_CALIBRATION if given[n] != default[n]]
    if unread:
        reason = "--stats were measured already; give one" if options.stats else "there is no --data"
        raise CoterieError(f"{flag_of(unread[0])} is of calibration and would be ignored: {reason}")
    if options.needs == "base" and not options.base:
        raise CoterieError(
            f"--method {method} compares with an earlier checkpoint; add --base MODEL, before fine-tuning"
        )
    if options.no_guard and not options.has_stats:
        raise CoterieError("--no-guard would be ignored: without statistics no super experts are known")


def _check_removed(options: Pruning) -> None:
    """Whether the method's choice is one for routers that stay as they are."""
    check_choice("--removed", options.fate, REMOVED)
    if options.fate != "remove" and options.needs in ("clusters", "outputs"):
        raise CoterieError(
            f"--removed {options.fate}: {options.criterion} chooses experts that take over for those that go, which a "
            "router that still chooses these does not let them; use --removed remove, or another method"
        )
    if options.fate == "constant" and options.needs != "stats":
        raise CoterieError(
            "--removed constant needs mean outputs, which are in the statistics: use a method that reads them, "
            f"{', '.join(methods.names('stats'))}"
        )
    if options.fate == "constant" and not options.stats and options.calibration.data:
        raise CoterieError(
            "--removed constant reads mean outputs from a file again whenever the plan is applied: give --stats FILE, "
            "which `coterie collect MODEL FILE` writes, or --removed remove"
        )


def _check_distance(options: Pruning) -> None:
    """What router rows, co-activation and statistics demand of each other."""
    lambda1, lambda2 = options.lambda1, options.lambda2
    for name, value in (("lambda1", lambda1), ("lambda2", lambda2)):
        if not 0 <= value < math.inf:
            raise CoterieError(f"--{name} {value}: expected a finite number, 0 or more")
    if lambda2 and not options.has_stats:
        raise CoterieError(
            "--lambda2 weighs co-activation, which only data show; "
            "add --stats FILE, which `coterie collect MODEL FILE` writes"
        )
    if lambda1 != 1 and not lambda2:
        raise CoterieError("--lambda1 weighs router distance against co-activation and would be ignored; add --lambda2")
    if options.distance != "frobenius" and not lambda1:
        raise CoterieError("--distance is of router rows and would be ignored with --lambda1 0")
    if options.weights and not options.has_stats and options.needs != "outputs":
        raise CoterieError("--weights are of the data's domains and would be ignored; add --data or --stats")
    check_weights(options.weights, options.calibration.data)
    if options.linkage == "official" and not stun.is_official(
        lambda1, lambda2, normalise=options.distance == "frobenius"
    ):
        raise CoterieError(
            "--linkage official knows --lambda1 and --lambda2 as 1 and 0, as 0 and 1, or as 1 and any number with "
            "--distance raw; use one of these, or --linkage complete"
        )
