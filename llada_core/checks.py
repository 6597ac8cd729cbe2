"""Checks of single values: each raises InputError that names the input and what to do."""

from .errors import InputError
from .image_tokens import PATCH, UPSAMPLING

PIXELS = PATCH * UPSAMPLING  # output pixels of a token, each way


def check_range(
    name: str, value: float, low: float, high: float, remedy: str = "Choose a value in that range."
) -> None:
    """Raise InputError unless low <= value <= high. NaN never passes."""
    if not low <= value <= high:
        raise InputError(name, value, f"a number from {low} to {high}", remedy)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise InputError unless value is one of choices."""
    if value not in choices:
        raise InputError(name, repr(value), "one of " + ", ".join(choices), "Choose one of these.")


def check_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) in tokens of a picture's size in pixels. Raises InputError where one is no multiple of 32."""
    for name, value in (("height", height), ("width", width)):
        if value < PIXELS or value % PIXELS:
            remedy = f"The nearest is {max(round(value / PIXELS), 1) * PIXELS}."
            raise InputError(name, f"{value} pixels", f"a multiple of {PIXELS}", remedy)
    return height // PIXELS, width // PIXELS


def check_text(name: str, text: str) -> None:
    """Raise InputError where a text that is needed is empty."""
    if not text.strip():
        raise InputError(name, "nothing", "a text", f"Write the {name}.")


def check_count(name: str, value: int, low: int, remedy: str) -> None:
    """Raise InputError unless value is a whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InputError(name, repr(value), f"a whole number of at least {low}", remedy)
