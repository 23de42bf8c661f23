"""The size and shape of the package in figures, of any checkout: `python benchmarks/house.py [CHECKOUT ...]`.

Counted is all Python below src/coterie but the reference model's. `tests/test_architecture.py` bounds some of it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

LONG, WIDE = 40, 7  # lines of a function without its docstring; its parameters
UNTYPED = r"dict\[str, Any\]"


def files(source: Path) -> list[Path]:
    """The package's Python files, without the reference model's recipe."""
    return sorted(p for p in source.rglob("*.py") if "reference_model" not in p.relative_to(source).parts)


def functions(source: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(file:name, definition) of every function and method."""
    for path in files(source):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(source)}:{node.name}", node


def num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, decorators and docstring left out."""
    docstring = 0 if ast.get_docstring(node) is None else (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
    return (node.end_lineno or 0) - node.lineno + 1 - docstring


def long_functions(source: Path) -> list[str]:
    """Functions of more than 40 lines."""
    return [name for name, node in functions(source) if num_lines(node) > LONG]


def wide_functions(source: Path) -> list[str]:
    """Functions of more than 7 parameters, of all kinds."""
    lists = ((name, (*n.args.posonlyargs, *n.args.args, *n.args.kwonlyargs)) for name, n in functions(source))
    return [name for name, parameters in lists if len(parameters) > WIDE]


def num_untyped(source: Path) -> int:
    """How often something is annotated as a dictionary of anything, by that name or by an alias of it."""
    total = 0
    for path in files(source):
        text = path.read_text(encoding="utf-8")
        aliases = re.findall(rf"^(\w+)(?:: TypeAlias)? = {UNTYPED}", text, re.MULTILINE)
        uses = (len(re.findall(rf"\b{alias}\b", text)) - 1 for alias in aliases)
        total += len(re.findall(UNTYPED, text)) + sum(uses)
    return total


def repeated_classes(source: Path) -> list[str]:
    """Class names that stand for more than one class."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in files(source))
    names = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return sorted(name for name, count in names.items() if count > 1)


def figures(source: Path) -> dict[str, int]:
    """Everything in numbers."""
    texts = [path.read_text(encoding="utf-8") for path in files(source)]
    return {
        "rooms at the top": sum(p.suffix == ".py" or (p / "__init__.py").exists() for p in source.iterdir()),
        "lines": sum(text.count("\n") for text in texts),
        "syntax nodes": sum(1 for text in texts for _ in ast.walk(ast.parse(text))),
        f"functions over {LONG} lines": len(long_functions(source)),
        f"functions with more than {WIDE} parameters": len(wide_functions(source)),
        "dict[str, Any]": num_untyped(source),
        "class names that occur twice": len(repeated_classes(source)),
    }


def main() -> None:
    checkouts = [Path(argument) for argument in sys.argv[1:]] or [Path(__file__).parent.parent]
    found = [figures(checkout / "src" / "coterie") for checkout in checkouts]
    for name in found[0]:
        print(f"{name:<40}" + "".join(f"{figure[name]:>10,}" for figure in found))


if __name__ == "__main__":
    main()
