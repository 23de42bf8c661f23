"""The shape of the package: imports point one way, start-up is light, and public names are what they say."""

import ast
import runpy
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import coterie

SOURCE = Path(coterie.__file__).parent

# The house, from the ground up: a file imports from its own folder or from those before it, for types too.
ORDER = """
    errors options reference_model engine storage codecs kernels model methods edits forward decide train judge pages
    verbs cli __main__
""".split()


def rank_of(module):
    """Of the reference model, the package itself, which names its files, is near the ground; its recipe is a verb."""
    return ORDER.index("verbs" if module.startswith("reference_model.") else module.partition(".")[0])


def imports(node):
    """The modules of coterie imported anywhere below a node: inside functions and for type annotations too."""
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
    for child in ast.iter_child_nodes(node):
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
    """No file imports from a folder above its own."""
    wrong = [
        f"{module} imports {imported}"
        for module, modules in graph().items()
        for imported in modules
        if rank_of(imported) > rank_of(module)
    ]
    assert wrong == []


def test_imports_make_no_circle():
    """Not even inside functions, for types, and within a folder."""
    TopologicalSorter(graph()).prepare()


def test_the_order_names_every_room():
    """The table above is the list of what stands at the top of the package."""
    rooms = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == {name for name in ORDER if name in rooms} and len(set(ORDER)) == len(ORDER)


def house():
    """The counts of `benchmarks/house.py`."""
    return runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "house.py"))


def test_functions_can_be_read_at_a_glance():
    """At most 8 have over 40 lines; over 7 parameters have public verbs alone, whose options are theirs."""
    assert len(house()["long_functions"](SOURCE)) <= 8
    assert [name for name in house()["wide_functions"](SOURCE) if not name.startswith("verbs/")] == []


def test_one_name_is_one_class():
    """A class name tells which class is meant, whatever the file."""
    assert house()["repeated_classes"](SOURCE) == []


def test_values_have_types():
    """Dictionaries of anything are for JSON."""
    assert house()["num_untyped"](SOURCE) <= 80


LIGHT = """
    storage.checkpoint model.family model.layer storage.numerics edits.plan verbs.apply storage.writer storage.record
    verbs.prune cli
""".split()


@pytest.mark.parametrize("modules", [LIGHT, ["verbs.inspect_"]], ids=["rewriting", "inspect"])
def test_light_modules_import_neither_torch_nor_transformers(modules):
    """What plans and rewrites checkpoints starts without the heavy libraries."""
    code = f"import sys, {', '.join(f'coterie.{m}' for m in modules)}; print([m for m in sys.modules if '.' not in m])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(ast.literal_eval(found))
    assert "coterie" in loaded
    assert not loaded & {"torch", "transformers", "scipy", "safetensors", "huggingface_hub", "accelerate"}


def test_llvmlite_is_loaded_where_kernels_run_alone():
    """Not by what loads models, packed ones included, nor by what computes with the others."""
    modules = "model.quantizer model.sparse model.loading judge.quality judge.speed forward.stream train.loop".split()
    code = f"import sys, {', '.join(f'coterie.{m}' for m in modules)}; assert 'llvmlite' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_functions_whatever_was_imported_before():
    """`coterie.apply` stays the function when something imports the module of the same name."""
    code = (
        "import coterie, importlib\n"
        "for name in ('apply', 'prune'):\n"
        "    importlib.import_module(f'coterie.verbs.{name}')\n"
        "from coterie.decide.pruning import Pruning\n"
        "assert callable(coterie.apply) and callable(coterie.prune), (coterie.apply, coterie.prune)\n"
        "from coterie import apply, prune, CoterieError\n"
        "assert apply is coterie.apply and prune.__module__ == 'coterie.verbs.prune' and Pruning\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_listed():
    """`dir(coterie)` shows the public names, and an unknown one is an AttributeError."""
    assert {"prune", "apply", "CoterieError"} <= set(dir(coterie))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = coterie.nothing
