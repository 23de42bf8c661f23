"""Attacks by what coterie itself writes and reads again: plans, results, and the journals of interrupted runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from attacks.corpus import ESCAPE, JSON_BOMBS, TB, Make, add_all, alone, attack, link, pipe
from coterie.verbs.prune import prune
from handmade import qwen

KEPT = {"kept": [0, 1, 2, 3]}


def plan(layers: Any, **more: Any) -> Make:
    return alone("plan.json", json.dumps({"layers": layers, **more}).encode())


def choice(**entries: Any) -> Make:
    return plan({"0": KEPT | entries, "1": KEPT})


add_all(
    "plan",
    {
        "kept-huge": ("An expert with a number of 4,000 digits.", choice(kept=[0, 1, 10**4000])),
        "kept-beyond": ("An expert that the model does not have.", choice(kept=[0, 1, 2, 8])),
        "kept-negative": ("Expert -1, the last one to Python.", choice(kept=[-1, 0, 1, 2])),
        "kept-twice": ("An expert kept twice.", choice(kept=[0, 0, 1, 2])),
        "kept-floats": ("Experts as floats.", choice(kept=[0.0, 1.0, 2.0, 3.0])),
        "kept-booleans": ("Experts as booleans.", choice(kept=[False, True])),
        "kept-a-million": ("A million experts.", lambda folder: choice(kept=list(range(10**6)))(folder)),
        "kept-none": ("No expert kept.", choice(kept=[])),
        "clusters-overlap": ("An expert in two clusters.", choice(clusters=[[0, 4], [1, 4], [2], [3]])),
        "clusters-huge": ("A cluster with an expert of 4,000 digits.", choice(clusters=[[0, 10**4000], [1], [2], [3]])),
        "clusters-nested": ("Clusters of clusters.", choice(clusters=[[[0]], [1], [2], [3]])),
        "layer-escapes": ("A layer whose name holds escape sequences.", plan({ESCAPE: KEPT})),
        "plan-in-other-digits": ("A layer's number in Arabic digits.", plan({"\u0661": KEPT})),
        "layer-unknown": ("A layer that the model does not have.", plan({"7": KEPT})),
        "layer-a-list": ("A list where a layer's decision should be.", plan({"0": [0, 1, 2, 3]})),
        "keys-escape": ("An unknown key that holds escape sequences.", plan({}, **{ESCAPE: 1})),
        "gates-nan": (
            "A gate that is no number.",
            plan({"0": {"condensed": {"experts": [0], "gates": [float("nan")]}}}),
        ),
        "gates-huge": (
            "A gate of 4,000 digits, beyond any float.",
            plan({"0": {"condensed": {"experts": [0], "gates": [10**4000]}}}),
        ),
        "gates-shared-huge": (
            "A shared gate of 4,000 digits.",
            plan({"0": {"condensed": {"experts": [0], "gates": [1], "shared_gate": 10**4000}}}),
        ),
        "condensed-huge": (
            "An expert of 4,000 digits, always on.",
            plan({"0": {"condensed": {"experts": [10**4000], "gates": [1]}}}),
        ),
        "condensed-all": (
            "A layer condensed in a family whose files it cannot fit.",
            plan({"0": {"condensed": {"experts": [9], "gates": [1]}}}),
        ),
        "dropped-huge": ("A dropped layer with a number of 4,000 digits.", plan({}, dropped=[10**4000])),
        "dropped-all": ("All layers dropped.", plan({}, dropped=[0, 1])),
        "converted-climbs": ("A model type that is a path.", plan({}, converted="../../etc/passwd")),
        "converted-escapes": ("A model type that holds escape sequences.", plan({}, converted=ESCAPE)),
        "sparsity-nan": (
            "A share of zeros that is no number.",
            plan({"0": KEPT | {"sparsity": {"gate": float("nan")}}}),
        ),
        "sparsity-huge": ("A share of zeros of 4,000 digits.", plan({"0": KEPT | {"sparsity": {"gate": 10**4000}}})),
        "sparsity-escapes": (
            "A record of zeros in a layer named by escape sequences.",
            plan({ESCAPE: {"sparsity": {"gate": 0.5}}}),
        ),
        "budget-a-list": ("A list where the budget should be.", plan({}, budget=[])),
        "plan-is-a-pipe": ("A named pipe, to wait for ever.", pipe("plan.json")),
        "plan-is-a-device": ("A file that never ends.", link("plan.json", "/dev/zero")),
        "plan-is-the-process": ("A file of no size that never ends.", link("plan.json", "/proc/self/mem")),
        "plan-in-a-circle": ("A link to itself.", link("plan.json", "plan.json")),
        "plan-sparse": ("10 TB in a sparse file.", alone("plan.json", b"{", 10 * TB)),
        "plan-is-empty": ("A file without a byte.", alone("plan.json", b"")),
    },
)
add_all(
    "plan",
    {f"plan-{name}": (f"Plan: {tries}", alone("plan.json", raw)) for name, (tries, raw) in JSON_BOMBS.items()},
)


# --- a result, its record changed ---------------------------------------------------------------------------------


def result(folder: Path, change: Any) -> Path:
    """What `prune` wrote, its coterie.json changed, beside the model it was made from."""
    model = qwen(folder / "original", layers=2)
    out = folder / "out"
    prune(model, out, experts=4)
    record = json.loads((out / "coterie.json").read_text())
    changed = change(record)
    (out / "coterie.json").write_bytes(changed if isinstance(changed, bytes) else json.dumps(changed).encode())
    return out


def record(change: Any) -> Make:
    return lambda folder: result(folder, change)


def without(*keys: str) -> Any:
    """The record without an entry of its report."""
    return lambda found: found | {"report": {k: v for k, v in found["report"].items() if k not in keys}}


add_all(
    "record",
    {
        "record-kept-beyond": (
            "A result whose plan keeps experts that are not there.",
            record(lambda r: r | {"plan": {"layers": {"0": {"kept": [0, 1, 2, 9]}}}}),
        ),
        "record-plan-a-string": ("A result whose plan is a string.", record(lambda r: r | {"plan": ESCAPE})),
        "record-trained-nothing": (
            "A result that says it was trained, and not what.",
            record(lambda r: r | {"command": "recover", "report": {"trained": []}}),
        ),
        "record-trained-all": (
            "A result that says tensors were trained that the model does not have.",
            record(lambda r: r | {"command": "recover", "report": {"trained": {"tensors": [ESCAPE]}}}),
        ),
    },
)
add_all(
    "record",
    {
        "record-source-a-list": ("A result whose source is a list.", record(lambda r: r | {"source": [1]})),
        "record-hash-escapes": (
            "A result whose fingerprint holds escape sequences.",
            record(lambda r: r | {"source": {"hash": ESCAPE, "path": ESCAPE}}),
        ),
        "record-report-empty": (
            "A finished result to resume, whose report says nothing.",
            record(lambda r: r | {"report": {}}),
        ),
        "record-report-half": (
            "A finished result to resume, whose report lacks sizes.",
            record(without("before", "sparsity")),
        ),
        "record-report-strings": (
            "A finished result to resume, whose report holds strings for numbers.",
            record(lambda r: r | {"report": dict.fromkeys(r["report"], ESCAPE)}),
        ),
        "record-report-nested": (
            "A finished result to resume, whose sizes are lists.",
            record(
                lambda r: r | {"report": r["report"] | {"after": {k: [v] for k, v in r["report"]["after"].items()}}}
            ),
        ),
    },
    "apply",
    "verify",
)
add_all(
    "record",
    {
        "record-warnings-escape": (
            "A finished result to resume, whose notes hold escape sequences.",
            record(lambda r: r | {"report": r["report"] | {"warnings": [ESCAPE, {"a": 1}]}}),
        ),
    },
    "apply",
    "resume",
    "verify",
)
add_all(
    "record",
    {
        f"record-{name}": (f"Result: {tries}", record(lambda _, raw=raw: raw()))
        for name, (tries, raw) in JSON_BOMBS.items()
    },
)


# --- an interrupted run, to be resumed ----------------------------------------------------------------------------


def interrupted(journal: bytes) -> Make:
    """OUT.partial with this journal; what is given back is OUT."""

    def make(folder: Path) -> Path:
        qwen(folder / "original", layers=2)
        (folder / "out.partial").mkdir()
        (folder / "out.partial" / "journal.jsonl").write_bytes(journal)
        return folder / "out"

    return make


def lines(*entries: Any) -> bytes:
    return b"".join(json.dumps(e).encode() + b"\n" for e in entries)


add_all(
    "interrupted",
    {
        "journal-climbs": (
            "A journal that calls a file above the folder finished.",
            interrupted(lines({"identity": "0"}, {"shard": "../original/model.safetensors", "bytes": 1})),
        ),
        "journal-of-another": ("A journal of another run.", interrupted(lines({"identity": ESCAPE}))),
        "journal-identity-list": ("A journal whose identity is a list.", interrupted(lines({"identity": [1]}))),
    },
)
add_all(
    "interrupted",
    {
        "journal-of-null-bytes": ("A journal of null bytes.", interrupted(bytes(5000))),
        "journal-deep": ("A journal of nested lists.", interrupted(b"[" * 100_000 + b"\n")),
        "journal-of-lists": ("A journal of lists.", interrupted(lines([], [], 1, None))),
        "journal-not-utf8": ("A journal that is no UTF-8.", interrupted(b'{"identity":"\xff"}\n')),
    },
    "resume",
)


@attack("interrupted", "OUT.partial is a link to a folder of somebody else's.")
def partial_is_a_link(folder: Path) -> Path:
    qwen(folder / "original", layers=2)
    (folder / "precious").mkdir()
    (folder / "precious" / "journal.jsonl").write_text("{}\n")
    (folder / "precious" / "thesis.txt").write_text("years of work")
    (folder / "out.partial").symlink_to("precious")
    return folder / "out"


@attack("interrupted", "OUT.partial is full of links to files of somebody else's.")
def partial_of_links(folder: Path) -> Path:
    qwen(folder / "original", layers=2)
    (folder / "precious").mkdir()
    (folder / "precious" / "thesis.txt").write_text("years of work")
    partial = folder / "out.partial"
    partial.mkdir()
    (partial / "journal.jsonl").write_text("")
    for name in ("model.safetensors", "model.safetensors.tmp", "config.json", "coterie.json", "README.md"):
        (partial / name).symlink_to(folder / "precious" / "thesis.txt")
    (partial / "folder").symlink_to(folder / "precious")
    return folder / "out"


@attack("interrupted", "The journal itself is a link to a file of somebody else's.")
def journal_is_a_link(folder: Path) -> Path:
    qwen(folder / "original", layers=2)
    (folder / "precious").mkdir()
    (folder / "precious" / "thesis.txt").write_text("years of work")
    (folder / "out.partial").mkdir()
    (folder / "out.partial" / "journal.jsonl").symlink_to(folder / "precious" / "thesis.txt")
    return folder / "out"


@attack("interrupted", "The journal is a named pipe, to wait for ever.")
def journal_is_a_pipe(folder: Path) -> Path:
    qwen(folder / "original", layers=2)
    (folder / "out.partial").mkdir()
    os.mkfifo(folder / "out.partial" / "journal.jsonl")
    return folder / "out"
