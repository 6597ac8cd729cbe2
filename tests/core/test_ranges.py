"""Every option and every numeric argument of the engine has a range of its own, whoever calls."""

import math
from dataclasses import fields

import pytest
import torch

from llada_core.checks import check_size, check_text
from llada_core.decoder.flow import normal_times, turbo_times
from llada_core.engine import LLaDAUni
from llada_core.errors import InputError, shown
from llada_core.image_tokens import ImageTokens, save_tokens
from llada_core.options import Decoding, Guidance, Sampling, Sprint

HUGE = (10**9, 2**64, 10**400, 10**5000, 1e308, -(10**5000))
NUMBERS = (math.nan, math.inf, -math.inf, -1, *HUGE)
OTHERS = ("8", "maybe", b"8", [8], {"a": 8}, (), 3 + 1j, object(), torch.ones(2), torch.tensor(1))  # no numbers
WHOLE = (2.0, 7.9, True, False)  # whole numbers are of type int, and a flag is none
TOKENS = ImageTokens((torch.zeros(2, 2, dtype=torch.int64),), 256)


@pytest.fixture(scope="module")
def idle(golden_checkpoint):
    """An engine that refuses to load anything."""

    class Nothing:
        def place(self, part, component, working_bytes):
            pytest.fail(f"{part} was loaded before the input was checked")

    return LLaDAUni(golden_checkpoint, Nothing())


def refused(call, *names: str) -> None:
    """`call` ends in an InputError of a screen's length that names the input."""
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.name in names
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("options", [Sampling, Guidance, Sprint, Decoding])
def test_no_field_of_any_option_takes_what_is_out_of_range(options):
    for field in fields(options):
        values = [*NUMBERS, *WHOLE, *OTHERS, None]
        if field.name == "seed":
            values.remove(10**9)
        if isinstance(field.default, bool):
            values = [value for value in values if not isinstance(value, bool)]
        if isinstance(field.default, float):
            values.remove(2.0)  # in the range of some
            values.remove(7.9)
        if "None" in str(field.type):
            values = values[:-1]
        for value in values:
            refused(lambda f=field, v=value: options(**{f.name: v}), field.name, _known_as(options, field.name))


def _known_as(options: type, field: str) -> str:
    """The name that a user knows a field by."""
    renamed = {"text": "guidance", "image": "image_guidance", "rescale": "guidance_rescale"}
    return renamed.get(field, field) if options is Guidance else f"decoder {field}"


def test_the_ends_of_ranges_are_in_them():
    Sampling(1024, 1024, 1.0, 100.0, 1_000_000, 1.0, 1024, 16_384)
    Sampling(1, 1, 0.0, 0.0, 0, 1e-9, 1, 1)
    Guidance(0, 0, 0)
    Guidance(100, 100, 1)
    Sprint(0, 0, 0, 0, 0, 0)
    Sprint(1, 1, 1, 1, 1024, 1)
    Decoding(False, 1000, 2**64 - 1, 100)
    Decoding(True, 1, 0, 0)


@pytest.mark.parametrize("value", [*NUMBERS, *OTHERS, *WHOLE, 0, 1001], ids=lambda value: shown(value)[:16])
def test_times_are_checked_before_they_are_made(value):
    refused(lambda: turbo_times(value), "steps")
    refused(lambda: normal_times(value), "steps")
    refused(lambda: normal_times(1), "steps")


@pytest.mark.parametrize("value", [*NUMBERS, *OTHERS, *WHOLE, None], ids=lambda value: shown(value)[:16])
def test_arguments_of_the_engine(value, idle):
    image = torch.zeros(1, 64, 64, 3)
    seeds = (10**9,)
    refused(lambda: idle.answer("?", max_new_tokens=value), "max_new_tokens")
    refused(lambda: idle.interleave("a", value), "max_images")
    refused(lambda: idle.generate("a", value, 64), "height")
    refused(lambda: idle.generate("a", 64, value), "width")
    if value is not False:  # which torch and Python count as 0
        refused(lambda: idle.encode(image, pixels=value), "pixels")
    refused(lambda: idle.encode(image, value), "purpose")
    refused(lambda: idle.encode(image, fit=value), "fit")
    if value not in seeds if isinstance(value, int) else True:
        if not isinstance(value, list):  # which asks for several at once
            refused(lambda: idle.generate("a", 64, 64, seed=value), "seed")
            refused(lambda: idle.answer("a", seed=value), "seed")
        refused(lambda: idle.interleave("a", seed=value), "seed")
    if not isinstance(value, bool):
        refused(lambda: idle.generate("a", 64, 64, thinking=value), "thinking")
    if not isinstance(value, str):
        refused(lambda: idle.generate(value, 64, 64), "prompt")
    if value is not None:
        for name in ("references", "sampling", "sprint", "guidance"):
            refused(lambda n=name: idle.generate("a", 64, 64, **{n: value}), name)
        refused(lambda: idle.answer("a", value), "images")
        refused(lambda: idle.interleave("a", references=value), "references")
        refused(lambda: idle.decode(TOKENS, value), "decoding")
    refused(lambda: idle.decode(value), "tokens")
    if not isinstance(value, torch.Tensor):
        refused(lambda: idle.encode(value), "image")


def test_sizes_and_texts():
    assert check_size(8192, 32) == (256, 1)
    refused(lambda: check_size(8224, 32), "height")
    refused(lambda: check_text("prompt", "a\udfff"), "prompt")
    refused(lambda: check_text("prompt", "a" * 1_000_001), "prompt")
    check_text("prompt", "a" * 1_000_000)


def test_tokens_that_cannot_be_written(tmp_path):
    refused(lambda: save_tokens(TOKENS, tmp_path / "no folder" / "t.safetensors"), "t.safetensors")
