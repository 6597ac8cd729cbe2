"""The two errors a user meets. Each names the input, what was found, what was expected and what to do."""

import reprlib

MOST_SHOWN = 300  # characters of what was found that an error repeats


def shown(value: object) -> str:
    """A value as an error tells it: plain values by themselves, cut short, and of anything else its type."""
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    """Reprs of a few dozen characters; nested values and long texts end in "..."."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxlong = 2, 80, 80

    def repr_int(self, x, level):
        # Python writes no number of more than 4,300 digits.
        return f"a whole number of {x.bit_length()} bits" if x.bit_length() > 256 else super().repr_int(x, level)

    def repr_instance(self, x, level):
        return repr(x) if x is None or isinstance(x, (bool, float)) else f"a value of type {type(x).__name__}"


_SHORT = _Short()


class InputError(ValueError):
    """A value handed to the engine cannot be used.

    Args:
        name: the input, as the user knows it ("image", "steps", "checkpoint/decoder").
        found: what it holds now.
        expected: what it must hold.
        remedy: the next step for the user.
    """

    def __init__(self, name: str, found: object, expected: str, remedy: str):
        text = str(found)
        if len(text) > MOST_SHOWN:
            text = f"{text[:MOST_SHOWN]}... ({len(text)} characters)"
        super().__init__(f"{name}: found {text}; expected {expected}. {remedy}")
        self.name, self.found, self.expected, self.remedy = name, text, expected, remedy


class CheckpointError(InputError):
    """A file of a checkpoint is missing, damaged or of another model."""
