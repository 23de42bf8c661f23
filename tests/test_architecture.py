"""The shape of the package: imports point one way, start-up is light, and public names are what they say."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import coterie

SOURCE = Path(coterie.__file__).parent

# A module imports only from its own rank or below; what is not named here is a verb or what serves one.
RANKS = [
    {"errors", "reference_model"},
    {"sources"},
    {"data", "numerics", "writing.copying"},
    {"checkpoint", "record", "writing.journal"},
    {"family", "streaming.tensors", "sparse.format", "sparse.view"},
    {"families", "own"},
    {"layer"},
    {"experts", "scales"},
    {
        "causal",
        "loading",
        "moe",
        "streaming.opened",
        "condensing.standin",
        "engine",
        "plan",
        "report",
        "routed",
        "routes",
        "stats",
        "writing",
    },
    {"methods", "view"},
    {"condensing.folding", "condensing.repackage", "merging"},
    {"condensing.dense"},
    {"condensing.dropping", "writing.in_place"},
    {"applying", "streaming.skeleton", "streaming.activations", "streaming.replay"},
    {"sparse", "masked"},
    {"streaming"},
    {"selecting", "zeroing", "condensing", "training"},
    {"prune", "verify", "evaluate", "inspect"},
    {"cli"},
    {"__main__"},
]
VERB = next(rank for rank, names in enumerate(RANKS) if "prune" in names)


def rank_of(module):
    """The rank of the module or of the nearest package around it. Of the reference model, only the package itself,
    which names its files, is below all: its recipe uses verbs."""
    if module.startswith("reference_model."):
        return VERB
    parts = module.split(".")
    names = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
    return next((rank for name in names for rank, members in enumerate(RANKS) if name in members), VERB)


def only_for_types(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(node):
    """The modules of coterie imported anywhere below a node, inside functions too, but for type annotations."""
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        if node.module == "coterie":
            yield from (alias.name for alias in node.names if alias.name not in coterie.__all__)
        elif node.module.startswith("coterie."):
            below = node.module.removeprefix("coterie.")
            for alias in node.names:
                module = SOURCE / below.replace(".", "/") / alias.name
                yield f"{below}.{alias.name}" if module.with_suffix(".py").exists() or module.is_dir() else below
    elif isinstance(node, ast.Import):
        yield from (a.name.removeprefix("coterie.") for a in node.names if a.name.startswith("coterie."))
    for child in node.orelse if only_for_types(node) else ast.iter_child_nodes(node):
        yield from imports(child)


def graph():
    """Module -> the modules it imports, named below `coterie`; a package stands for its __init__."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        if module != "__init__":  # it names the public functions, and imports none of them
            found[module] = set(imports(ast.parse(path.read_text()))) - {module}
    return found


def test_imports_point_one_way():
    """cli > verbs > applying > methods > layer > family > checkpoint: no module imports from a higher rank."""
    wrong = [
        f"{module} imports {imported}"
        for module, modules in graph().items()
        for imported in modules
        if rank_of(imported) > rank_of(module)
    ]
    assert wrong == []


def test_imports_make_no_circle():
    """Not even inside functions, and not within a rank."""
    TopologicalSorter(graph()).prepare()


def test_the_ranks_are_of_modules_that_exist():
    """The table above names the package's modules."""
    for name in set().union(*RANKS):
        path = SOURCE / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), name


LIGHT = ["checkpoint", "family", "layer", "numerics", "plan", "apply", "writing.writer", "report", "prune", "cli"]


@pytest.mark.parametrize("modules", [LIGHT, ["inspect"]], ids=["rewriting", "inspect"])
def test_light_modules_import_neither_torch_nor_transformers(modules):
    """What plans and rewrites checkpoints starts without the heavy libraries."""
    code = f"import sys, {', '.join(f'coterie.{m}' for m in modules)}; print([m for m in sys.modules if '.' not in m])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(ast.literal_eval(found))
    assert "coterie" in loaded
    assert not loaded & {"torch", "transformers", "scipy", "safetensors", "huggingface_hub", "accelerate"}


def test_public_names_are_functions_whatever_was_imported_before():
    """`coterie.apply` stays the function when something imports the module of the same name."""
    code = (
        "import coterie, importlib\n"
        "for name in ('apply', 'prune'):\n"
        "    importlib.import_module(f'coterie.{name}')\n"
        "from coterie.prune import Options\n"
        "assert callable(coterie.apply) and callable(coterie.prune), (coterie.apply, coterie.prune)\n"
        "from coterie import apply, prune, CoterieError\n"
        "assert apply is coterie.apply and prune.__module__ == 'coterie.prune' and Options\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_listed():
    """`dir(coterie)` shows the public names, and an unknown one is an AttributeError."""
    assert {"prune", "apply", "CoterieError"} <= set(dir(coterie))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = coterie.nothing
