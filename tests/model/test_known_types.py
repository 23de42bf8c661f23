"""Every model type of the installed transformers that has experts is a family, part of one, or named with a reason."""

import re
from functools import cache
from pathlib import Path

import pytest
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

import tiny
from coterie.errors import CoterieError
from coterie.model.families import NO_FAMILY
from coterie.model.family import registry
from coterie.model.layer import Model

COUNT = re.compile(r"experts$|_experts_|moe_num_experts|num_experts")  # in the name of a config's field
MODULE = re.compile(r"^@use_experts_implementation|^class \w*(Experts|MoE|SparseMoe\w*)\(nn\.Module\)", re.MULTILINE)


def fields(config_class: type) -> set[str]:
    """The names under which a config keeps anything."""
    annotated = {name for base in config_class.__mro__ for name in getattr(base, "__annotations__", {})}
    return annotated | set(getattr(config_class, "attribute_map", None) or {})


def parts(config_class: type) -> list[type]:
    """A config's class and those of the configs inside it, as far as they are fixed."""
    inner = [c for c in (getattr(config_class, "sub_configs", None) or {}).values() if hasattr(c, "model_type")]
    return [config_class, *(found for c in inner for found in parts(c))]


@cache
def with_experts() -> dict[str, set[str]]:
    """Every model type whose config counts experts -> the types of the configs inside it."""
    found = {}
    for model_type in CONFIG_MAPPING_NAMES:
        classes = parts(CONFIG_MAPPING[model_type])
        if any(COUNT.search(name) for c in classes for name in fields(c)):
            found[model_type] = {c.model_type for c in classes[1:]}
    return found


def test_every_type_with_experts_is_known_or_named():
    """One that is neither a family, nor inside a type that is or is named, fails here: write it into families/."""
    known = registry().keys() | NO_FAMILY.keys()
    inside = {part for whole, parts in with_experts().items() if whole in known for part in parts}
    assert not sorted(with_experts().keys() - known - inside)


def test_every_module_of_experts_is_of_such_a_type():
    """No modeling file has experts whose config counts them under a name that this test does not look for."""
    models = Path(transformers.__file__).parent / "models"
    files = {path.parent.name for path in models.glob("*/modeling_*.py") if MODULE.search(path.read_text())}
    assert not sorted(files - {model_type_to_module_name(t) for t in with_experts()})


def test_no_type_is_known_and_named():
    """Reasons are given for types that exist and are no families."""
    assert not NO_FAMILY.keys() & registry().keys()
    assert NO_FAMILY.keys() <= with_experts().keys()


@pytest.mark.parametrize("model_type", ["doge", "zaya"])
def test_a_named_type_is_refused_with_its_reason(tmp_path, model_type):
    """`inspect` and all others say why, instead of naming neighbours."""
    tensors, config = tiny.HAND_MADE["bailing_moe"]()
    with pytest.raises(CoterieError, match=re.escape(NO_FAMILY[model_type])):
        Model.open(tiny.write(tmp_path / "model", tensors, {**config, "model_type": model_type}))
