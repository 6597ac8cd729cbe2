"""Fixtures of the node tests."""

import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("node_test_graphs", Path(__file__).with_name("graphs.py"))
_GRAPHS = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_GRAPHS)


@pytest.fixture(scope="session")
def graphs():
    """The module of small API graphs."""
    return _GRAPHS
