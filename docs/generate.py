"""Writes docs/cli.md, docs/methods.md, docs/families.md and the package's stub from the code.

`--check` fails when they are stale.
"""

import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_args, get_origin

import coterie
from coterie.cli import application, commands
from coterie.edits.kinds.convert import CONVERSIONS
from coterie.methods import merge, prune, quantize, sparsify
from coterie.model.families import NO_FAMILY
from coterie.model.family import Family, registry, unable

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
    experts, merged, weights, bits = (_methods(package) for package in (prune, merge, sparsify, quantize))
    return (
        f"# Methods\n\n## Which experts go\n\n{experts}\n## Which experts become one\n\n{merged}\n"
        f"## Which weights become zero\n\n{weights}\n## How experts get few bits\n\n{bits}"
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
        notes += [f"a second stack of experts: `{family.side}N` in plans"] if family.side else []
        loads = "yes" if family.stock else "no class"
        rows.append(f"| `{model_type}` | `{layout.router}` | `{layout.experts}N.` | {loads} | {'; '.join(notes)} |")
    head = "| model type | router | experts | stock transformers | beside the router |\n|---|---|---|---|---|\n"
    return (
        f"# Model families\n\n{len(rows)} model types. Names are relative to `...layers.N.`.\n\n{head}"
        + "\n".join(rows)
        + f"\n\n{ability_table()}"
        + "\n\n## No families\n\nOther model types of transformers that have experts, and why they are none here.\n\n"
        + "| model type | why |\n|---|---|\n"
        + "\n".join(f"| `{model_type}` | {why} |" for model_type, why in sorted(NO_FAMILY.items()))
        + "\n"
    )


SERVED = re.compile(r"^\| (\w+)(?:, [^|]*)? \| \d+ to \d+ experts \| yes \|", re.MULTILINE)  # of docs/serving.md
READ = ("deepseek_v2", "glm4_moe_lite")  # whose vLLM code was read: it takes the count of experts from the config
# Not condensed, as only tensors say (biases, a fused shared expert, what is around a block), or a config around them.
UNFOLDED = (
    "aria", "glm4v_moe", "gpt_oss", "jetmoe", "kimi_k25", "minimax_m3_vl", "minimax_m3_vl_text", "muse_spark",
    "qwen3_5_moe", "qwen4_exp",
)  # fmt: skip
REFUSED = {"minimax_m2": "refused ([llama.cpp#19715](https://github.com/ggml-org/llama.cpp/issues/19715))"}
ABOUT = """## What works

By the default method of each command, on weights in plain floats; `coterie inspect MODEL` says it of a checkpoint. *own
layout* is read by `coterie.load` alone. **vLLM**: *runs*: pruned models were run against transformers
([serving.md](serving.md)); *read*: its source takes the count from the config; nothing: not tried. **llama.cpp**:
nothing here was converted; known are one refusal of its converter, and one of what is pruned in general
([llama.cpp#9483](https://github.com/ggml-org/llama.cpp/issues/9483)).

| model type | prune | calibrate | condense | verify | vLLM | llama.cpp |
|---|---|---|---|---|---|---|
"""


def ability_table() -> str:
    """What commands and other engines do with each model type."""
    served = set(SERVED.findall((FOLDER / "serving.md").read_text(encoding="utf-8")))
    rows = []
    for name, family in sorted(registry().items()):
        calibrated = family.stock and not unable({"model_type": name}, "stream")
        verified = "logits" if family.stock else "files and bytes"
        served_as = "runs" if name in served else "read" if name in READ else ""
        cells = (
            "yes",
            "yes" if calibrated else "no",
            condensed(name, family),
            verified,
            served_as,
            REFUSED.get(name, ""),
        )
        rows.append(f"| `{name}` | {' | '.join(cells)} |\n")
    return ABOUT + "".join(rows)


def condensed(name: str, family: Family) -> str:
    """As what a condensed model is written; "no" where it cannot be."""
    layout, config = family.layouts[0], {"model_type": name}
    folds = layout.gate is not None and layout.router.startswith(layout.blocks[0]) and name not in UNFOLDED
    if not folds or unable(config, "fold") or unable(config, "stream"):
        return "no"
    found = CONVERSIONS.get(name)
    if not family.stock:
        return f"becomes `{found.target}`" if found else "no"
    if family.dense:
        return "own layout, or for the first layers its own" if family.dense.kind == "prefix" else "stays stock"
    return f"becomes `{found.target}`" if found else "own layout"


STUB = FOLDER.parent / "src" / "coterie" / "__init__.pyi"
OTHERS = ("Checkpoint", "CoterieError", "Family", "Plan", "Report", "load", "read_expert")


def stub() -> str:
    """The public names with their types, for type checkers: `__init__.py` loads them on first use."""
    imports = [f"from {getattr(coterie, name).__module__} import {name} as {name}" for name in OTHERS]
    verbs = [_declared(name, inspect.signature(getattr(coterie, name))) for name in commands()]
    modules = sorted(set(re.findall(r"\b((?:[a-z_]+\.)+)[A-Z]\w*", "\n".join(verbs))))
    named = "\n".join(f"import {module.rstrip('.')}" for module in modules)
    head = f"{named}\nfrom typing import Any\n\n" + "\n".join(imports)
    values = "VERBS: dict[str, pathlib.Path]\n__version__: str"
    return f'"""Made by docs/generate.py."""\n\n{head}\n\n{values}\n\n' + "\n".join(verbs)


def _declared(name: str, signature: inspect.Signature) -> str:
    """A function's declaration, with plain types."""
    plain = [p.replace(annotation=_plain(p.annotation), default=p.default) for p in signature.parameters.values()]
    parts, keywords = [], False
    for p in plain:
        if p.kind is p.KEYWORD_ONLY and not keywords:
            parts, keywords = [*parts, "*"], True
        default = "" if p.default is p.empty else " = ..."
        parts.append(f"{p.name}: {inspect.formatannotation(p.annotation)}{default}")
    body = "".join(f"    {part},\n" for part in parts)
    return f"def {name}(\n{body}) -> {inspect.formatannotation(signature.return_annotation)}: ...\n"


def _plain(annotation: object) -> object:
    """The type under an `Annotated`; of an option that is read from several types, anything."""
    if get_origin(annotation) is not Annotated:
        return annotation
    base, *beside = get_args(annotation)
    return Any if any(getattr(found, "read", None) for found in beside) else base


def main() -> None:
    stale = []
    pages = {FOLDER / "cli.md": cli(), FOLDER / "methods.md": method_tables(), FOLDER / "families.md": family_table()}
    for page, text in (pages | {STUB: stub()}).items():
        name = page.name
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in sys.argv:
                page.write_text(text, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"stale: {', '.join(stale)}; run python docs/generate.py")


if __name__ == "__main__":
    main()
