"""Options as records: frozen dataclasses, whose fields are options or groups of options, which are such records too."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any


def flat(record: Any) -> dict[str, Any]:
    """The values of a record by name, in order; groups expand in place, and a name declared earlier stays."""
    found: dict[str, Any] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        found = found | (flat(value) | found if is_dataclass(value) else {field.name: value})
    return found
