"""Checks of single values: each raises InputError that names the input and what to do."""

import torch

from .errors import InputError, shown
from .image_tokens import PATCH, UPSAMPLING

PIXELS = PATCH * UPSAMPLING  # output pixels of a token, each way
MAX_SIDE = 8192  # output pixels each way; which sizes a checkpoint can announce is its tokenizer's matter
MAX_TEXT = 1_000_000  # characters: beyond any context, and still split into tokens in a second
MAX_SEED = 2**64 - 1  # what torch's generators take
# Numbers that an expanded tensor may claim: so many in any case, or so many for each that it holds.
CLAIMED, CLAIMED_OF_ONE = 2**24, 256


def check_range(
    name: str, value: float, low: float, high: float, remedy: str = "Choose a value in that range."
) -> None:
    """Raise InputError unless value is a number and low <= value <= high. NaN never passes, nor does True."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise InputError(name, shown(value), f"a number from {low} to {high}", remedy)


def check_count(name: str, value: int, low: int, high: int, remedy: str = "Choose a value in that range.") -> None:
    """Raise InputError unless value is a whole number and low <= value <= high. 2.0 is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(name, shown(value), f"a whole number from {low} to {high}", remedy)


def check_flag(name: str, value: bool) -> None:
    """Raise InputError unless value is True or False: "no" would count as true."""
    if not isinstance(value, bool):
        raise InputError(name, shown(value), "true or false", "Choose one of the two.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise InputError unless value is one of choices."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(name, shown(value), "one of " + ", ".join(choices), "Choose one of these.")


def check_kind(name: str, value: object, kind: type | tuple[type, ...], expected: str, remedy: str) -> None:
    """Raise InputError unless value is an instance of `kind`."""
    if not isinstance(value, kind):
        raise InputError(name, shown(value), expected, remedy)


def check_numbers(name: str, value: object, expected: str, remedy: str) -> None:
    """Raise InputError unless value is a tensor whose real numbers lie in memory, about as many as its shape says.

    An expanded one costs nothing, and whatever is computed from it costs what it claims.
    """
    check_kind(name, value, torch.Tensor, expected, remedy)
    assert isinstance(value, torch.Tensor)
    kind = odd_kind(value)
    if kind is not None:
        raise InputError(name, f"a {kind} tensor", expected, remedy)
    held = value.untyped_storage().nbytes() // value.element_size()
    if value.numel() > max(CLAIMED, CLAIMED_OF_ONE * held):
        found = f"shape {list(value.shape)} out of {held} numbers"
        raise InputError(name, found, "a tensor that holds what it claims", "Repeat less of it.")


def odd_kind(tensor: torch.Tensor) -> str | None:
    """What a tensor is that fails in most operations, each time with another error; None for real numbers in memory."""
    kinds = {"nested": tensor.is_nested, "sparse": tensor.layout != torch.strided, "complex": tensor.is_complex()}
    kinds |= {"quantized": tensor.is_quantized, "meta": tensor.is_meta}
    return next((kind for kind, is_one in kinds.items() if is_one), None)


def check_optional(name: str, value: object, kind: type) -> None:
    """Raise InputError unless value is None or an instance of `kind`."""
    check_kind(name, value, (kind, type(None)), f"{kind.__name__} or None", f"Hand over {kind.__name__}, or nothing.")


def check_seed(seed: int) -> None:
    """Raise InputError unless seed is a whole number of 64 bits."""
    check_count("seed", seed, 0, MAX_SEED, "Seeds are whole numbers from 0 up.")


def check_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) in tokens of a picture's size in pixels.

    Raises InputError where one is no multiple of 32 or beyond 8192.
    """
    for name, value in (("height", height), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(name, shown(value), f"a multiple of {PIXELS}", "Give a whole number of pixels.")
        if not PIXELS <= value <= MAX_SIDE or value % PIXELS:
            nearest = min(max((value + PIXELS // 2) // PIXELS, 1) * PIXELS, MAX_SIDE)
            expected = f"a multiple of {PIXELS} up to {MAX_SIDE}"
            raise InputError(name, f"{shown(value)} pixels", expected, f"The nearest is {nearest}.")
    return height // PIXELS, width // PIXELS


def check_text(name: str, text: str) -> None:
    """Raise InputError where a text that is needed is empty, no text, or longer than a million characters."""
    remedy = f"Write the {name}."
    check_kind(name, text, str, "a text", remedy)
    if not text.strip():
        raise InputError(name, "nothing", "a text", remedy)
    if len(text) > MAX_TEXT:
        raise InputError(name, f"{len(text)} characters", f"at most {MAX_TEXT}", f"Shorten the {name}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"half a character at place {error.start} (a lone surrogate)"
        raise InputError(name, found, "whole characters", f"Write the {name} again.") from error
