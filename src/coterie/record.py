"""`coterie.json` as it is found in a folder: what a command recorded, which may since have become anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coterie.checkpoint import load_json


def record_of(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's coterie.json; nothing where there is none. Raises: CoterieError for a damaged one."""
    file = folder / "coterie.json"
    return load_json(file) if file.is_file() else None


def object_at(value: Any, *keys: str) -> dict[str, Any]:
    """The object under these keys, one inside the other; an empty one where anything else is found."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}
