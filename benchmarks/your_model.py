"""Sizes that commands would write of well-known models, from dry runs over headers of their names, shapes and dtypes.

    python benchmarks/your_model.py [--write docs/your-model.md]

Nothing of the models' weights is needed or read: each is made of holes (`synthetic.py`), in a few megabytes of disk.
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
from pathlib import Path

import coterie
from synthetic import MODELS, make, write_data
from tables import markdown

BEGIN, END = "<!-- sizes:begin -->", "<!-- sizes:end -->"
NAMES = ("qwen3-30b-a3b", "gpt-oss-20b", "mixtral-8x7b", "deepseek-v2-lite")
COMMANDS = (
    "prune --ratio 0.25",
    "prune --ratio 0.5",
    "quantize --bits 4",
    "quantize --bits 3",
    "stun --sparsity 0.4",
    "stun --sparsity 0.4 --save sparse",
    "condense --layers 4",
)


def dry_run(command: str, model: Path, folder: Path) -> int | str:
    """Bytes that the command would write, or why it would refuse."""
    verb, *words = shlex.split(command)
    pairs = zip(words[::2], words[1::2], strict=True)
    options = {name.removeprefix("--").replace("-", "_"): _value(text) for name, text in pairs}
    if verb == "stun":
        options["data"] = {"ids": str(folder / "ids.jsonl")}
    try:
        report = getattr(coterie, verb)(model, folder / "out", dry_run=True, **options)
    except coterie.CoterieError as error:
        return str(error).removeprefix(f"{model}: ").partition(";")[0]
    return report.report["after"]["bytes"]


def _value(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def sizes(name: str, folder: Path) -> str:
    """The table of one model."""
    model = make(name, folder / name, sparse=True)
    write_data(folder / "ids.jsonl", vocabulary=MODELS[name][0]["vocab_size"], samples=4, seq_len=64)
    before, rows = coterie.inspect(model)["bytes"], []
    for command in COMMANDS:
        found = dry_run(command, model, folder)
        shown = found if isinstance(found, str) else f"{found / 1e9:.1f} GB"
        rows.append((f"`coterie {command}`", shown, "" if isinstance(found, str) else f"{found / before:.2f}"))
    return markdown([f"{name}, {before / 1e9:.1f} GB", "file", "of the original"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="a page to put the tables into, between its marks")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        text = "\n\n".join(sizes(name, Path(place)) for name in NAMES)
    print(text)
    if options.write:
        before, _, rest = options.write.read_text().partition(BEGIN)
        options.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
