"""The two errors a user meets. Each names the input, what was found, what was expected and what to do."""


class InputError(ValueError):
    """A value handed to the engine cannot be used.

    Args:
        name: the input, as the user knows it ("image", "steps", "checkpoint/decoder").
        found: what it holds now.
        expected: what it must hold.
        remedy: the next step for the user.
    """

    def __init__(self, name: str, found: object, expected: str, remedy: str):
        super().__init__(f"{name}: found {found}; expected {expected}. {remedy}")
        self.name = name


class CheckpointError(InputError):
    """A file of a checkpoint is missing, damaged or of another model."""
