"""Calls with one value or several: which inputs are lists, and what belongs together."""

from typing import Any

from .errors import InputError, shown


def broadcast(**inputs: Any) -> tuple[list[dict[str, Any]], bool]:
    """A dictionary of single values for each thing that is asked for, and whether any input was a list.

    A value that is no list (or tuple) is everybody's.

    Raises:
        InputError: an empty list, or lists of different lengths.
    """
    lists = {name: value for name, value in inputs.items() if isinstance(value, (list, tuple))}
    if not lists:
        return [dict(inputs)], False
    counts = {name: len(value) for name, value in lists.items()}
    first = next(iter(counts))
    for name, count in counts.items():
        if count == 0:
            raise InputError(name, shown(lists[name]), "at least one", "Hand over a value, or a list of some.")
        if count != counts[first]:
            found = f"{count} beside {counts[first]} of {first}"
            raise InputError(name, found, "as many, or one for all", "Make the lists equally long.")
    each = [
        {name: value[at] if name in lists else value for name, value in inputs.items()} for at in range(counts[first])
    ]
    return each, True
