"""STUN on a whole model: distances to clusters under a budget, one expert of each, and how much of it data decided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np

from coterie.decide.criteria import Guarded, Selected, Task, how_stable, kept_of, origin, tokens_of, total
from coterie.decide.pruning import Pruning
from coterie.edits.plan import Choice
from coterie.errors import CoterieError
from coterie.methods.prune import stun
from coterie.model.experts import Layer, expert_storage
from coterie.model.layer import MoE
from coterie.model.stats import Stats
from coterie.storage.record import Progress, no_progress

UNMEASURED = "prediction layers and second models are never measured: router rows alone decide there"
UNREAD = "experts are stored in a way that we cannot compare: of three or more alike, the tie rule says who stays"
Nearest = Callable[[Layer, tuple[int, ...]], int]  # of three or more members: who is nearest to their mean
FAR = 1e3  # times the largest distance: of guarded experts


@dataclass(frozen=True)
class Clusterer:
    """STUN, asked for a choice.

    guarded: super experts by block: each is a cluster of its own as long as there are others to join.
    floor: the fewest experts that a global budget may leave in a layer. dry_run: no weights are read.
    """

    task: Task
    how: Pruning
    guarded: Guarded = field(default_factory=dict)
    floor: int = 1
    dry_run: bool = False

    def decide(self, stats: Stats | None, on_progress: Progress) -> Selected:
        """The choices, what the budget and the statistics came to, and what should be said aloud."""
        known = cache(nearest)
        choices, found = self.choose(stats, known, on_progress)
        unread = [reason for layer in self.task.layers.values() if (reason := unreadable(layer))]
        notes = [f"{UNREAD} ({unread[0]})"] if unread else []
        if stats is None:
            return Selected(choices, found, notes=tuple(notes))
        found |= origin(stats, self.how.stats)
        notes += [UNMEASURED] if any(b.mtp for b in self.task.layers) else []
        stable, unstable = how_stable(stats, "the choice is", lambda h: kept_of(self.task, self.choose(h, known)[0]))
        found |= {"stability": stable} if stable else {}
        return Selected(choices, found, notes=(*notes, *unstable))

    def choose(
        self, stats: Stats | None, nearest: Nearest, on_progress: Progress = no_progress
    ) -> tuple[dict[MoE, Choice], dict[str, object]]:
        """The choices, and what the budget came to.

        Raises: CoterieError for a layer that the statistics do not hold, or without any token.
        """
        tokens: dict[MoE, np.ndarray] = {}  # routed to each expert of a measured block, (E,)
        pairs: dict[MoE, np.ndarray] = {}  # routed to both of two, (E, E)
        for block in self.task.measured if stats else ():
            assert stats
            pairs |= {block: total(stats, block, "coactivation", self.task.weights)} if self.how.lambda2 else {}
            tokens[block] = tokens_of(stats, block, self.task.weights)
        clusters, found = self._cluster(pairs)
        return self._representatives(clusters, tokens, nearest, on_progress), found

    def _cluster(self, pairs: dict[MoE, np.ndarray]) -> tuple[dict[MoE, stun.Clusters], dict[str, object]]:
        """Each block's clusters under the budget, and what the budget came to."""
        layers, uniform, num_groups = self.task.layers, self.task.kept, self.task.num_groups
        matrices = {b: self._distance(b, layer, pairs.get(b)) for b, layer in layers.items()}
        if self.how.linkage == "official":
            return self._official(matrices)
        trees = {b: [stun.dendrogram(d) for d in _per_group(m, num_groups)] for b, m in matrices.items()}
        counts = dict.fromkeys(layers, uniform)
        heights = {b: [sum(hs) for hs in zip(*(t.heights for t in ts), strict=True)] for b, ts in trees.items()}
        found: dict[str, object] = {"cost": _cost(heights, counts, num_groups)}
        if self.how.budget == "global":
            main = [b for b in layers if not b.mtp]
            limits = [(b.num_experts - self.floor) // num_groups for b in main]
            wanted = sum(b.num_experts - uniform for b in main) // num_groups
            cut = stun.cut_globally([heights[b] for b in main], wanted, limits)
            asked = {b: b.num_experts - n * num_groups for b, n in zip(main, cut, strict=True)}
            found["global"] = {b.name: n for b, n in asked.items()}
            found["global_cost"] = _cost(heights, asked, num_groups)
            counts |= self._settle(asked, found)
        return {b: _in_layer([t.cut(counts[b] // num_groups) for t in ts], b) for b, ts in trees.items()}, found

    def _official(self, matrices: dict[MoE, np.ndarray]) -> tuple[dict[MoE, stun.Clusters], dict[str, object]]:
        """The published program: single linkage at a fixed count, or its threshold search for a total."""
        uniform, num_groups, found = self.task.kept, self.task.num_groups, dict[str, object]()
        searched: dict[MoE, stun.Clusters] = {}
        if self.how.budget == "global":
            if num_groups > 1:
                raise CoterieError("--linkage official --budget global knows no routing groups; use --linkage complete")
            main = [b for b in matrices if not b.mtp]
            lists = stun.official_global([matrices[b] for b in main], uniform * len(main), self.how.threshold)
            asked = {b: len(c) for b, c in zip(main, lists, strict=True)}
            found["global"] = {b.name: n for b, n in asked.items()}
            self._settle(asked, found)
            searched = {} if found.get("rounded") else dict(zip(main, lists, strict=True))
        clusters = {}
        for block, matrix in matrices.items():
            merges = (block.num_experts - uniform) // num_groups
            parts = [stun.official_clusters(m, np.inf, merges) for m in _per_group(matrix, num_groups)]
            clusters[block] = _in_layer(parts, block)
        return clusters | searched, found

    def _settle(self, asked: dict[MoE, int], found: dict[str, object]) -> dict[MoE, int]:
        """What becomes of unequal counts. Stock configs hold one count."""
        if len(set(asked.values())) == 1 or self.how.non_uniform == "round":
            found["rounded"] = len(set(asked.values())) > 1
            return {}
        if self.how.non_uniform == "refuse":
            low, high = min(asked.values()), max(asked.values())
            raise CoterieError(
                f"--non-uniform refuse: the budget keeps {low} to {high} experts; stock configs hold one count"
            )
        if any(b.attention for b in asked):
            raise CoterieError("--non-uniform coterie: attention experts share the config's one count; use round")
        found["layout"] = "coterie"
        return asked

    def _distance(self, block: MoE, layer: Layer, pairs: np.ndarray | None) -> np.ndarray:
        """STUN's distance (E, E), of router rows alone where nothing is measured; guarded experts are far from all."""
        distances: Callable[..., np.ndarray] = stun.distances
        if self.how.linkage == "official":
            distances = partial(stun.official_distances, dtype=layer.experts.checkpoint.tensors[block.router].dtype)
        lambda1, lambda2 = (1.0, 0.0) if pairs is None else (self.how.lambda1, self.how.lambda2)
        normalise = self.how.distance == "frobenius"
        rows, _ = layer.router, layer.norms  # which of two stays depends on those: read while the rows are in memory
        matrix = distances(rows, coactivation=pairs, lambda1=lambda1, lambda2=lambda2, normalise=normalise)
        if not (guarded := self.guarded.get(block)):
            return matrix
        result = matrix.copy()
        result[guarded, :] = result[:, guarded] = FAR * (1 + np.abs(matrix).max())  # so that those join first
        result[guarded, guarded] = matrix[guarded, guarded]
        return result

    def _representatives(
        self, clusters: dict[MoE, stun.Clusters], tokens: dict[MoE, np.ndarray], nearest: Nearest, on_progress: Progress
    ) -> dict[MoE, Choice]:
        """One expert of each cluster; `nearest` finds the one nearest to the mean of three or more.

        Raises: CoterieError where more super experts than clusters leave two in one.
        """
        choices = {}
        for done, (block, layer) in enumerate(self.task.layers.items()):
            found, guarded, kept = clusters[block], set(self.guarded.get(block, [])), []
            by_ties = self.dry_run or bool(unreadable(layer))
            if any(len(guarded & set(c)) > 1 for c in found):
                raise CoterieError(
                    f"{block.name}: more super experts than the {len(found)} experts that stay (or than those of a "
                    "routing group); keep more, or --no-guard"
                )
            for cluster in found:
                if guarded & set(cluster):
                    kept.append(min(guarded & set(cluster)))
                elif by_ties or len(cluster) < 3:  # a dry run reads no weights: the tie rule stands in
                    kept.append(stun.pair_winner(cluster, layer.norms, tokens.get(block)))
                else:
                    kept.append(nearest(layer, tuple(cluster)))
            kappa = 0 if any(guarded & set(c) and len(c) > 1 for c in found) else self.how.kappa
            merged = len(found) < kappa and any(len(c) > 1 for c in found)  # to their means
            ordered = sorted(zip(kept, map(tuple, found), strict=True))
            choices[block] = Choice(tuple(e for e, _ in ordered), tuple(c for _, c in ordered), merged)
            on_progress("choosing representatives", done + 1, len(self.task.layers))
        return choices


def unreadable(layer: Layer) -> str:
    """Why the experts' weights are bytes to us that move, but cannot be compared; empty if they can."""
    try:
        expert_storage(layer.experts.checkpoint, layer.experts.block, 0)
    except CoterieError as error:
        return str(error)
    return ""


def nearest(layer: Layer, members: tuple[int, ...]) -> int:
    """The member, of three or more, that is nearest to the mean of their weights."""
    return stun.representative(members, layer.experts, layer.norms)


def _cost(heights: dict[MoE, list[float]], counts: dict[MoE, int], num_groups: int) -> float:
    """The sum of the heights of all merges made: what the clustering gives up."""
    return float(sum(sum(heights[b][: len(heights[b]) + 1 - n // num_groups]) for b, n in counts.items()))


def _per_group(matrix: np.ndarray, num_groups: int) -> list[np.ndarray]:
    """The diagonal blocks: experts may only merge inside their routing group."""
    size = len(matrix) // num_groups
    return [matrix[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(num_groups)]


def _in_layer(groups: list[stun.Clusters], block: MoE) -> stun.Clusters:
    """The clusters of all routing groups, in the layer's ids."""
    size = block.num_experts // len(groups)
    return [[g * size + e for e in cluster] for g, clusters in enumerate(groups) for cluster in clusters]
