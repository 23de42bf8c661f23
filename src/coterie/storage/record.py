"""The record of a run: what verbs return, write as `coterie.json`, and may find in a folder; and the model card."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import resource
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.errors import printable
from coterie.options import flag_of
from coterie.storage.checkpoint import load_json

OBJECT = "(given as an object)"  # what is recorded of a plan that is no file
Progress = Callable[[str, int, int], None]  # (what is being done, units done, units in all)


def no_progress(stage: str, done: int, total: int) -> None:
    """The default: say nothing."""


def part_of(on_progress: Progress, index: int, count: int) -> Progress:
    """What tells of one of `count` parts that take about as long as each other, as of the whole."""
    return lambda stage, done, total: on_progress(stage, index * total + done, count * total)


@dataclass(frozen=True, repr=False)
class Report:
    """The content of `coterie.json`; `format` is 1.

    before, after: parameters, bytes and experts of MODEL and OUT. seconds: how long it took. data: all of it as one
    dictionary, as coterie.json has it.
    """

    command: str
    options: dict[str, object]
    source: dict[str, Any]
    plan: dict[str, object]
    report: dict[str, Any]
    versions: dict[str, str]

    def as_dict(self) -> dict[str, object]:
        names = ("command", "options", "source", "versions", "plan", "report")
        return {"format": 1} | {name: getattr(self, name) for name in names}

    @property
    def before(self) -> dict[str, Any]:
        return self.report["before"]

    @property
    def after(self) -> dict[str, Any]:
        return self.report["after"]

    @property
    def seconds(self) -> float:
        return self.report["seconds"]

    @property
    def data(self) -> dict[str, object]:
        return self.as_dict()

    def __repr__(self) -> str:
        what = f"{self.command}, planned" if self.report.get("dry_run") else self.command
        sizes = f"{self.before['bytes']:,} -> {self.after['bytes']:,} bytes"
        experts = f"{self.before['experts']} -> {self.after['experts']} experts per layer"
        return f"<Report of {what}: {sizes}, {experts}, {self.seconds:.1f} s>"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shaped the result (read from metadata: nothing is imported)."""
    found = {"python": platform.python_version()}
    for package in ("coterie", "numpy", "scipy", "torch", "transformers", "safetensors"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Stopwatch:
    """Seconds since it was made, and this process's peak resident bytes."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def read(self) -> dict[str, float]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
        return {"seconds": round(time.monotonic() - self._began, 3), "peak_rss_bytes": peak}


def typed(command: str, options: Mapping[str, object]) -> str:
    """The command as one would type it, in one line, from what it recorded; MODEL, OUT and PLAN stand for paths."""
    words = ["coterie", command, "MODEL", "OUT"]
    for name, value in options.items():
        flag = flag_of(name)
        if command == "apply" and name == "plan":
            words.insert(3, "PLAN" if value == OBJECT else str(value))
        elif isinstance(value, dict):
            words += [word for key, file in value.items() for word in (flag, f"{key}={file}")]
        elif value is True:
            words.append(flag)
        elif value not in (None, "", []) and value is not False:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)]
    return printable(shlex.join(words))


# --- a record that is found in a folder, and may hold anything -------------------------------------------------


def record_of(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's coterie.json; nothing where there is none. Raises: CoterieError for a damaged one."""
    file = folder / "coterie.json"
    return load_json(file) if file.is_file() else None


def object_at(value: object, *keys: str) -> dict[str, Any]:
    """The object under these keys, one inside the other; an empty one where anything else is found."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def to_json(value: object) -> str:
    """Indented JSON in which lists of numbers stay on one line."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    # Strings hold no line breaks once encoded, so what has them is a list.
    return re.sub(r"\[\n\s*([-\d.,\s]+?)\n\s*\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text) + "\n"
