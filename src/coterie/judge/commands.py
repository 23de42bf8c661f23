"""Commands that `analyze` and `report` propose, ready to be pasted."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from coterie.errors import printable

STATS = "stats"  # what they call the file of statistics


@dataclass(frozen=True)
class Commands:
    """Commands on one model and its data, ready to be pasted. can: as `inspect` says it: verb -> true, or why not."""

    model: str
    data: Mapping[str, str] = field(default_factory=dict)
    can: Mapping[str, bool | str] = field(default_factory=dict)

    def line(self, verb: str, out: str, *words: object, data: bool = False) -> str:
        """`coterie VERB MODEL OUT WORDS`, with the data that the model was analyzed on where `data`."""
        able = self.can.get(verb, True)
        if able is not True:
            return printable(f"# coterie {verb} cannot be used here: {able}")
        named = [f"{name}={file}" for name, file in self.data.items()] if data else []
        more = [str(word) for word in words] + [word for item in named for word in ("--data", item)]
        return printable(shlex.join(["coterie", verb, self.model, out, *more]))

    def with_stats(self, verb: str, *words: object) -> str:
        """Statistics first, then a command that reads them."""
        last = (STATS,) if verb == "compare" else ("pruned", "--stats", STATS)
        return f"{self.line('collect', STATS, data=True)}\n{self.line(verb, last[0], *words, *last[1:])}"
