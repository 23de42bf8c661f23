"""The whole corpus: `ATTACKS`. As a program, writes it to a folder: `python tests/attacks/make.py FOLDER`.

Given `--table`, brings the table in docs/reliability.md up to date instead.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attacks import configs, folders, headers, plans, tables, texts
from attacks.corpus import ATTACKS, Attack

__all__ = ["ATTACKS", "Attack", "page", "table"]
MODULES = (headers, folders, configs, plans, tables, texts)  # importing them fills the corpus


def table() -> str:
    """Every attack with what it tries, by kind, as Markdown."""
    rows = [
        f"| {a.kind} | `{a.name}` | {a.tries} | {', '.join(a.harmless)} |"
        for a in sorted(ATTACKS, key=lambda a: a.kind)
    ]
    return "| as | attack | what it tries | may be accepted by |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- attacks -->\n", "<!-- end -->\n"


def page() -> str:
    """docs/reliability.md with the table as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def main(folder: Path) -> None:
    for attack in ATTACKS:
        home = folder / attack.kind / attack.name
        home.mkdir(parents=True)
        attack.make(home)


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        main(Path(sys.argv[1]))
