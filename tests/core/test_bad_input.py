"""Values the engine cannot use: refused before any work, and the message names the input, the fault and the remedy."""

import math

import pytest
import torch

from llada_core.checks import check_size
from llada_core.engine import LLaDAUni
from llada_core.errors import InputError
from llada_core.image_tokens import ImageTokens
from llada_core.options import Decoding, Guidance, Sampling, Sprint
from llada_core.placement import OneDevice

NAN = math.nan
TOKENS = ImageTokens((torch.zeros(2, 2, dtype=torch.int64),), 256)
OTHERS = ImageTokens((torch.zeros(2, 2, dtype=torch.int64),), 512)
FEW = Sampling(steps=1, thinking_steps=1, thinking_length=8)


class NoSeat(OneDevice):
    """A manager that fails the test as soon as a component is asked for."""

    def place(self, part, component, working_bytes):
        pytest.fail(f"{part} was loaded before the input was checked")


@pytest.fixture(scope="module")
def idle(golden_checkpoint):
    """An engine that may check its input and do nothing else."""
    return LLaDAUni(golden_checkpoint, NoSeat())


def no_progress(progress):
    pytest.fail(f"{progress} was reported before the input was checked")


REFUSED = {
    "empty prompt": (lambda m, p: m.generate("", progress=p), r"prompt: found nothing; expected a text\. Write the p"),
    "blank prompt": (lambda m, p: m.generate(" \n\t", progress=p), r"prompt: found nothing"),
    "empty instruction": (lambda m, p: m.generate("", references=TOKENS, progress=p), r"prompt: found nothing"),
    "empty question": (lambda m, p: m.answer("  ", TOKENS, progress=p), r"question: found nothing; .*Write the quest"),
    "empty story": (lambda m, p: m.interleave("", progress=p), r"instruction: found nothing"),
    "odd height": (
        lambda m, p: m.generate("fox", 1000, 1024, progress=p),
        r"height: found 1000 pixels; expected a multiple of 32 up to 8192\. The nearest is 992",
    ),
    "odd width": (lambda m, p: m.generate("fox", 1024, 1009, progress=p), r"width: found 1009 pixels.*nearest is 1024"),
    "no size": (lambda m, p: m.generate("fox", 0, 1024, progress=p), r"height: found 0 pixels.*nearest is 32"),
    "negative size": (lambda m, p: m.generate("fox", 1024, -32, progress=p), r"width: found -32 pixels"),
    "beyond the dimension tokens": (
        lambda m, p: m.generate("fox", 4128, 32, progress=p),
        r"size: found 129 x 1 tokens; expected 1 to 128 tokens each way \(4096 pixels of output\)\. Choose a smaller",
    ),
    "image beyond the context": (
        lambda m, p: m.generate("fox", 4096, 4096, progress=p),
        r"length: found \d+ prompt tokens and an image of 128 x 128 tokens, 16\d{3} in all; expected at most 8192 tok",
    ),
    "plan beyond the context": (
        lambda m, p: m.generate("x" * 40, 4096, 2016, thinking=True, sampling=FEW, progress=p),
        r"length: found \d+ prompt tokens and a plan and an image of 128 x 63 tokens, 8\d{3} in all; .* at most 8192",
    ),
    "prompt beyond the context": (
        lambda m, p: m.generate("x" * 9000, 32, 32, progress=p),
        r"length: found 9\d{3} prom",
    ),
    "question beyond the context": (
        lambda m, p: m.answer("x" * 9000, progress=p),
        r"length: found 9\d{3} prompt tokens and a text, 9\d{3} in all; expected at most 8192.*shorter prompt",
    ),
    "references beyond the context": (
        lambda m, p: m.generate(
            "blue", references=ImageTokens((torch.zeros(64, 64, dtype=torch.int64),) * 2, 256), progress=p
        ),
        r"length: found 8\d{3} prompt tokens and an image of 64 x 64 tokens.*fewer or smaller reference images",
    ),
    "thinking with references": (
        lambda m, p: m.generate("blue", references=TOKENS, thinking=True, progress=p),
        r"thinking: found on, with references; expected off when editing\. Turn thinking off, or disconnect",
    ),
    "references of another codebook": (
        lambda m, p: m.generate("blue", references=OTHERS, progress=p),
        r"tokens: found codes of a codebook of 512; expected .* of 256\. Encode the image with",
    ),
    "question about tokens of another codebook": (lambda m, p: m.answer("?", OTHERS, progress=p), r"codebook of 512"),
    "story of another codebook": (lambda m, p: m.interleave("a", references=OTHERS, progress=p), r"codebook of 512"),
    "decoding of another codebook": (lambda m, p: m.decode(OTHERS, progress=p), r"codebook of 512"),
    "no answer": (
        lambda m, p: m.answer("?", max_new_tokens=0, progress=p),
        r"max_new_tokens: found 0; expected a whole",
    ),
    "no story": (lambda m, p: m.interleave("a", 0, progress=p), r"max_images: found 0; expected a whole number from 1"),
    "grid too large for the decoder": (
        lambda m, p: m.decode(ImageTokens((torch.zeros(1, 600, dtype=torch.int64),), 256), progress=p),
        r"tokens: found a grid of 1 x 600; expected at most \d+ tokens and 512 a side",
    ),
}

IMAGES = {
    "NaN": (torch.full((1, 64, 64, 3), NAN), r"image: found values from nan.*; expected values from 0 to 1.*NaN"),
    "infinity": (torch.full((1, 64, 64, 3), math.inf), r"image: found values from inf"),
    "0 to 255": (torch.full((1, 64, 64, 3), 255.0), r"found values from 255 to 255; .*Scale or clamp"),
    "one NaN in the second image": (
        torch.cat((torch.zeros(1, 64, 64, 3), torch.full((1, 64, 64, 3), NAN))),
        r"image: found values from nan",
    ),
    "zero size": (torch.zeros(1, 0, 64, 3), r"image: found 64x0 pixels; expected sides of at least 1 pixel"),
    "more than memory": (
        torch.zeros(1).expand(1, 100_000, 100_000, 3),
        r"image: found shape \[1, 100000, 100000, 3\] out of 1 numbers",
    ),
    "no images": (torch.zeros(0, 64, 64, 3), r"image: found shape \[0, 64, 64, 3\]; expected a batch.*at least one"),
    "one channel": (torch.zeros(1, 64, 64, 1), r"image: found 1 channel\(s\); expected .*3 or 4.*Convert .* to RGB"),
    "a mask": (torch.zeros(1, 64, 64), r"image: found shape \[1, 64, 64\]; expected a batch \[batch, height, width"),
    "video": (torch.zeros(1, 1, 64, 64, 3), r"image: found shape \[1, 1, 64, 64, 3\]"),
    "whole numbers": (torch.zeros(1, 64, 64, 3, dtype=torch.uint8), r"image: found torch.uint8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_work(name, idle):
    call, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        call(idle, no_progress)


@pytest.mark.parametrize("purpose", ["understand", "edit"])
@pytest.mark.parametrize("name", IMAGES)
def test_refused_images(name, purpose, idle):
    image, message = IMAGES[name]
    with pytest.raises(InputError, match=message):
        idle.encode(image, purpose, progress=no_progress)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"purpose": "read"}, r"purpose: found 'read'; expected one of edit, understand"),
        ({"fit": "squeeze"}, r"fit: found 'squeeze'; expected one of cover, crop"),
        ({"pixels": 10}, r"pixels: found 10; expected a whole number from 1024 to"),
    ],
)
def test_refused_ways_to_encode(argument, message, idle):
    with pytest.raises(InputError, match=message):
        idle.encode(torch.zeros(1, 64, 64, 3), progress=no_progress, **argument)


def test_the_same_engine_still_works_after_every_error(golden_checkpoint, model):
    """Nothing is lost: an engine that refused everything then draws what a fresh one draws."""
    engine = LLaDAUni(golden_checkpoint)
    for call, _ in REFUSED.values():
        with pytest.raises(InputError):
            call(engine, None)
    drawn = engine.generate("fox", 64, 96, sampling=FEW).tokens.grids[0]
    assert torch.equal(drawn, model.generate("fox", 64, 96, sampling=FEW).tokens.grids[0])


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (
            Sampling,
            {"steps": 0},
            r"steps: found 0; expected a whole number from 1 to 1024\. Each block needs at least one",
        ),
        (Sampling, {"steps": -3}, r"steps: found -3"),
        (Sampling, {"steps": 2.5}, r"steps: found 2\.5; expected a whole number"),
        (Sampling, {"steps": True}, r"steps: found True"),
        (Sampling, {"block_length": 0}, r"block_length: found 0"),
        (Sampling, {"block_length": 2048}, r"block_length: found 2048; expected a whole number from 1 to 1024"),
        (Sampling, {"threshold": -0.1}, r"threshold: found -0\.1; expected a number from 0\.0 to 1\.0"),
        (Sampling, {"threshold": 1.01}, r"threshold: found 1\.01"),
        (Sampling, {"threshold": NAN}, r"threshold: found nan; expected a number from 0\.0 to 1\.0"),
        (Sampling, {"temperature": -1.0}, r"temperature: found -1"),
        (Sampling, {"temperature": math.inf}, r"temperature: found inf"),
        (Sampling, {"top_k": -1}, r"top_k: found -1; .*Use 0 to keep every candidate"),
        (Sampling, {"top_p": 0.0}, r"top_p: found 0\.0; expected a number above 0 and up to 1"),
        (Sampling, {"top_p": NAN}, r"top_p: found nan"),
        (Sampling, {"thinking_steps": 0}, r"thinking_steps: found 0"),
        (Sampling, {"thinking_length": 0}, r"thinking_length: found 0"),
        (Guidance, {"text": NAN}, r"guidance: found nan"),
        (Guidance, {"text": -1.0}, r"guidance: found -1"),
        (Guidance, {"image": 101.0}, r"image_guidance: found 101"),
        (Guidance, {"rescale": 1.5}, r"guidance_rescale: found 1\.5; expected a number from 0\.0 to 1\.0"),
        (Sprint, {"keep_ratio": NAN}, r"keep_ratio: found nan"),
        (Sprint, {"text_keep_ratio": 1.1}, r"text_keep_ratio: found 1\.1"),
        (Sprint, {"image_keep_ratio": -0.1}, r"image_keep_ratio: found -0\.1"),
        (Sprint, {"threshold": 2.0}, r"threshold: found 2\.0"),
        (Sprint, {"warmup": -1}, r"warmup: found -1"),
        (Sprint, {"alpha": NAN}, r"alpha: found nan"),
        (
            Sprint,
            {"confidence": "luck"},
            r"confidence: found 'luck'; expected one of low_confidence, top_k_margin, neg",
        ),
        (Decoding, {"steps": -1}, r"steps: found -1; .*Use 0 for the decoder's own default"),
        (Decoding, {"steps": 1, "turbo": False}, r"steps: found 1; expected 0 or at least 2 for the normal decoder"),
        (Decoding, {"seed": -1}, r"seed: found -1"),
        (Decoding, {"seed": 2**64}, r"seed: found 18446744073709551616"),
        (Decoding, {"guidance": NAN}, r"decoder guidance: found nan"),
    ],
)
def test_refused_options(options, arguments, message):
    with pytest.raises(InputError, match=message):
        options(**arguments)


def test_sizes_are_counted_in_tokens_of_32_pixels():
    assert check_size(1024, 512) == (32, 16)
