"""Writes docs/cli.md, docs/methods.md and docs/families.md from the code; `--check` fails when they are stale."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from coterie.cli import application, commands
from coterie.methods import merge, prune, sparsify
from coterie.model.families import NO_FAMILY
from coterie.model.family import registry

FOLDER = Path(__file__).parent


def cli() -> str:
    """The help of every command, as typed."""
    from typer.testing import CliRunner

    runner = CliRunner(env={"COLUMNS": "110", "TERMINAL_WIDTH": "110"})
    pages = [
        runner.invoke(application(verb), [*([verb] if verb else []), "--help"], prog_name="coterie").output
        for verb in (None, *commands())
    ]
    return "# The command line\n\n" + "\n".join(f"```\n{page.strip()}\n```\n" for page in pages)


def method_tables() -> str:
    """Every method with the first sentence of its file."""
    experts, merged, weights = _methods(prune), _methods(merge), _methods(sparsify)
    return (
        f"# Methods\n\n## Which experts go\n\n{experts}\n## Which experts become one\n\n{merged}\n"
        f"## Which weights become zero\n\n{weights}"
    )


def _methods(package: ModuleType) -> str:
    rows = []
    for name in package.names():
        doc = (importlib.import_module(f"{package.__name__}.{name.replace('-', '_')}").__doc__ or "").strip()
        rows.append(f"| `{name}` | {' '.join(doc.split(chr(10) * 2)[0].split())} |")
    return "| method | what it does |\n|---|---|\n" + "\n".join(rows) + "\n"


def family_table() -> str:
    """Every model type with where its experts and routers stand."""
    rows = []
    for model_type, family in sorted(registry().items()):
        layout = family.layouts[0]
        notes = [f"rows: `{r}`" for r in layout.rows] + [f"table: `{t}`" for t in layout.tables]
        notes += ["attention experts"] if family.attention else []
        loads = "yes" if family.stock else "no class"
        rows.append(f"| `{model_type}` | `{layout.router}` | `{layout.experts}N.` | {loads} | {'; '.join(notes)} |")
    head = "| model type | router | experts | stock transformers | beside the router |\n|---|---|---|---|---|\n"
    return (
        f"# Model families\n\n{len(rows)} model types. Names are relative to `...layers.N.`.\n\n{head}"
        + "\n".join(rows)
        + "\n\n## No families\n\nOther model types of transformers that have experts, and why they are none here.\n\n"
        + "| model type | why |\n|---|---|\n"
        + "\n".join(f"| `{model_type}` | {why} |" for model_type, why in sorted(NO_FAMILY.items()))
        + "\n"
    )


def main() -> None:
    stale = []
    for name, text in {"cli.md": cli(), "methods.md": method_tables(), "families.md": family_table()}.items():
        page = FOLDER / name
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in sys.argv:
                page.write_text(text, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"stale: {', '.join(stale)}; run python docs/generate.py")


if __name__ == "__main__":
    main()
