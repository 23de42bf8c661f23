"""Fixtures that several test files share."""

import os
from pathlib import Path

import hypothesis
import pytest
from hypothesis import HealthCheck, settings

import tiny
from coterie.options import typed

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny tensors more threads cost more than they save
hypothesis.settings.register_profile("coterie", deadline=None)  # a busy machine is not a slow function
hypothesis.settings.load_profile("coterie")
settings.register_profile("coterie", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # cores are shared
settings.load_profile("coterie")


@pytest.fixture(scope="session", autouse=True)
def as_typed():
    """Refusals name options as a command line does, which most tests quote; one test is about those in Python."""
    with typed():
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """`tiny_checkpoint(model_type, fused=False)`: a folder built once per session, to be read and copied only."""
    home = tmp_path_factory.mktemp("tiny")
    built: dict[str, Path] = {}

    def get(model_type: str, fused: bool = False) -> Path:
        name = f"{model_type}-fused" if fused else model_type
        if name not in built:
            built[name] = tiny.save(model_type, home / name, fused=fused)
        return built[name]

    return get
