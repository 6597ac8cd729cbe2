"""Nodes that take the host's lists whole (is_input_list): every input comes as a list, also in validate_inputs."""

from collections.abc import Mapping
from typing import Any


def first(value: Any) -> Any:
    """The first of a list, as the host hands over single values; a value that is no list is itself."""
    return value[0] if isinstance(value, (list, tuple)) and value else value


def one_by_one(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The inputs of each run, as the host would call the node; shorter lists repeat their last.

    A value that is no list counts as one of one.
    """
    lists = {name: value if isinstance(value, list) else [value] for name, value in inputs.items()}
    count = max(map(len, lists.values()))
    return [{name: of[min(at, len(of) - 1)] for name, of in lists.items()} for at in range(count)]
