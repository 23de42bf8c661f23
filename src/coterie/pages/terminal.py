"""What a command says to a person: lines of text, two columns under a title."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from coterie.storage.record import Report

Rows = list[tuple[str, str]]
UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
Asked = Mapping[str, object]  # the options of a command by name, as they were typed


def table(title: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """The title, then names beside values, indented and aligned."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    yield title
    yield from (f"  {name:<{width}}  {value}" for name, value in rows)


def interval(found: Mapping[str, float], *, percent: bool = False) -> str:
    """A value and the interval it lies in."""
    scale, unit = (100, " %") if percent else (1, "")
    return f"{found['value'] * scale:.2f}{unit}  [{found['low'] * scale:.2f}, {found['high'] * scale:.2f}]"


def known(value: float | None, unit: float = 1) -> str:
    """A whole number of units, or that it is unknown."""
    return "unknown" if value is None else f"{value / unit:,.0f}"


def sized(num_bytes: float) -> str:
    """Bytes in the largest unit of which there is one."""
    found = next((unit for unit in UNITS if num_bytes >= UNITS[unit]), None)
    return f"{num_bytes / UNITS[found]:,.1f} {found}" if found else f"{num_bytes:,} bytes"


def show_report(report: Report, asked: Asked) -> Iterator[str]:
    """What a command made of a checkpoint: sizes before and after, and what was removed."""
    found = report.report
    before, after, packed = found["before"], found["after"], found.get("packed")
    title = "planned, nothing written" if found.get("dry_run") else f"{asked['out']}: done"
    rows = [(name, f"{before[name]:,} -> {after[name]:,}") for name in ("parameters", "bytes")]
    if packed:
        sizes = f"{packed['before']:,} -> {packed['after']:,}"
        rows.append(("packed", f"{packed['tensors']:,} matrices: {sizes} bytes in all"))
    if widths := found.get("widths"):
        counts = ", ".join(f"{count:,} of {width} bits" for width, count in widths["items"].items() if count)
        rows.append((f"{asked.get('per', 'expert')}s by width", counts))
    rows += [
        ("experts per layer", f"{before['experts']} -> {after['experts']}"),
        ("experts' weights removed or zero", f"{100 * found['sparsity']['experts']:.2f} %{_share_asked(report)}"),
        ("all weights removed or zero", f"{100 * found['sparsity']['all']:.2f} %"),
        *_zeros(report),
        ("peak memory", f"{found['peak_rss_bytes'] / 1e6:.0f} MB"),
    ]
    yield from table(f"{title} in {found['seconds']:.1f} s", rows)
    yield from _still_stored(report)


def _share_asked(report: Report) -> str:
    """The share of experts' weights that the options of a command name."""
    share, pattern = report.options.get("sparsity"), report.options.get("pattern")
    return (
        f", asked for: {100 * share:g} %" if isinstance(share, float) else f", asked for: {pattern}" if pattern else ""
    )


def _still_stored(report: Report) -> Iterator[str]:
    """That zeros take room until they are packed."""
    found = report.report
    if not found.get("expert_zero_share") or found.get("packed") or report.options.get("save") == "sparse":
        return
    then = "will be" if found.get("dry_run") else "are"
    text = f"{100 * found['expert_zero_share']:.3g} % of the experts' weights {then} zero; the files stay as large"
    packed = found.get("packed_estimate")
    yield f"{text} unless --save sparse (or `coterie pack`): then about {sized(packed)}" if packed else text


def _zeros(report: Report) -> Rows:
    found = report.report
    if "expert_zeros" not in found:
        return []
    if "kurtosis" not in found:
        return [("zeros in experts", f"{found['expert_zeros']:,}")]
    kurtosis = " -> ".join("none" if k is None else f"{k:.3f}" for k in found["kurtosis"].values())
    cold = len(found["cold_experts"])
    return [
        ("zeros in experts", f"{found['expert_zeros']:,}"),
        ("kurtosis of their weights", kurtosis),
        ("experts too cold to calibrate", f"{cold:,}" + (" (pruned by magnitude)" if cold else "")),
    ]


def show_packed(report: Report, asked: Asked) -> Iterator[str]:
    """What packing or unpacking made of the bytes."""
    found = report.report
    done = found["packed"] if "packed" in found else found["unpacked"]
    before, after = done["before"], done["after"]
    out = asked["out"] if "out" in asked else asked["dense"]
    rows = [("bytes", f"{before:,} -> {after:,} ({after / before:.3f})"), ("matrices", f"{done['tensors']:,}")]
    rows += [("of which zeros", f"{100 * done['zeros']:.2f} %")] if "zeros" in done else []
    return table("planned, nothing written" if found.get("dry_run") else f"{out}: done", rows)
