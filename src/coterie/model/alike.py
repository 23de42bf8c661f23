"""Whether a block's experts are alike as far as their bytes are moved: what is missing is named, no coding is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coterie.errors import CoterieError
from coterie.model.family import Layout
from coterie.storage.checkpoint import FLOATS, Tensor

Group = dict[str, Tensor]  # the tensors of one matrix, by what their names add to the matrix's


def check_alike(
    where: str, layout: Layout, experts: Sequence[Mapping[str, str]], tensors: Mapping[str, Tensor]
) -> None:
    """Every expert has the same matrices, stored alike; or as plain floats, as a quantiser leaves some of them.

    Alike are dtypes and numbers of axes, and the shapes of float weights: how long the other tensors of a coded matrix
    are may depend on its numbers, and on its bits.
    Raises: CoterieError for an expert that differs, with the first tensor that does.
    """
    signatures = [_signature(expert, tensors) for expert in experts]
    if all(signature == signatures[0] for signature in signatures):
        return  # as nearly always; what follows takes far longer
    matrices = [_by_matrix(layout, expert, tensors) for expert in experts]
    seen: dict[tuple[str, bool], int] = {}  # by matrix, and whether it is plain: the first expert that has it so
    for number, expert in enumerate(matrices):
        for stem in sorted({*expert, *matrices[0]}):
            group = expert.get(stem, {})
            first = seen.setdefault((stem, _is_plain(group)), number) if group and stem in matrices[0] else 0
            other = matrices[first].get(stem, {})
            odd = next((key for key in sorted({*group, *other}) if _kind(key, group) != _kind(key, other)), None)
            if odd is not None:
                found, expected = _shown(group.get(odd)), _shown(other.get(odd))
                raise CoterieError(
                    f"{where}: expert {number} differs from expert {first} ({stem}{odd}: {found}, there {expected}); "
                    "expected all alike, or some of them as plain floats"
                )
    for (stem, plain), number in seen.items():
        if not plain and (stem, True) in seen:
            floats, parts = matrices[seen[stem, True]][stem], matrices[number][stem]
            if 8 * max(t.num_bytes for t in parts.values()) < max(t.num_parameters for t in floats.values()):
                raise CoterieError(
                    f"{where}: expert {number} differs from expert {seen[stem, True]} ({stem}: {', '.join(parts)}, too "
                    "few bytes for its weights); expected all alike"
                )


def _signature(expert: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, object]:
    return {key: (tensors[name].dtype, tensors[name].shape) for key, name in expert.items()}


def _by_matrix(layout: Layout, expert: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Group]:
    """An expert's tensors by the matrix that they belong to; one that belongs to none is by itself."""
    found: dict[str, Group] = {}
    for key, name in expert.items():
        stem = next((p for p in layout.parts if key == p or key.startswith((f"{p}.", f"{p}_"))), key)
        found.setdefault(stem, {})[key.removeprefix(stem)] = tensors[name]
    return found


def _is_plain(group: Group) -> bool:
    """Whether a matrix is floats, with a bias at most beside them."""
    weight = group.get(".weight") or group.get("")
    return weight is not None and weight.dtype in FLOATS and group.keys() <= {".weight", "", ".bias"}


def _kind(key: str, group: Group) -> tuple[str, tuple[int, ...]] | None:
    """What must be alike of one of a matrix's tensors."""
    tensor = group.get(key)
    if tensor is None:
        return None
    is_weight = key in ("", ".weight", ".bias") and tensor.dtype.startswith(("F", "BF"))
    return tensor.dtype, tensor.shape if is_weight else (len(tensor.shape),)


def _shown(tensor: Tensor | None) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}" if tensor else "missing"
