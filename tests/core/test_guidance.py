"""Classifier-free guidance: which rows a task runs, and how their logits become one."""

import pytest
import torch

from llada_core.options import Guidance
from llada_core.prompts import Prompts
from llada_core.sampling.guidance import guided_branches, merge
from llada_core.sampling.pipeline import for_editing

C, U, N = [1], [2], [3]
DRAW, EDIT, TEXT = Prompts(C, U), Prompts(C, U, N), Prompts(C)


@pytest.mark.parametrize(
    ("rows", "text", "image", "expected"),
    [
        (TEXT, 4.0, 2.0, [C]),
        (DRAW, 2.0, 0.0, [C, U]),
        (DRAW, 1.0, 0.0, [C]),
        (DRAW, 0.0, 0.0, [C, U]),  # g = u: the unconditional row alone decides
        (DRAW, 2.0, 1.0, [C, U]),  # without references there is nothing for an image scale to act on
        (EDIT, 4.0, 0.0, [C, U]),
        (EDIT, 4.0, 1.5, [C, U, N]),
        (EDIT, 0.0, 0.0, [C]),
        (EDIT, 0.0, 1.5, [C, U, N]),
        (EDIT, 1.0, 0.0, [C]),
        (EDIT, 1.0, 1.5, [C, U, N]),
    ],
)
def test_rows_for_scales(rows, text, image, expected):
    assert guided_branches(rows, Guidance(text, image)) == expected


def test_text_scale_one_draws_one_row_even_with_an_image_scale():
    """Without references an image scale has nothing to act on, so scale 1 still means one row."""
    assert guided_branches(DRAW, Guidance(1.0, 0.5)) == [C]


def random_logits(rows: int) -> torch.Tensor:
    return torch.randn(rows, 5, 40, generator=torch.Generator().manual_seed(rows)) * 4


def test_one_row_is_itself():
    logits = random_logits(1)
    assert torch.equal(merge(logits, Guidance(3.0, 2.0, 0.7)), logits[0])
    assert torch.equal(merge(logits, None), logits[0])


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0, 2.0, 7.5])
def test_text_guidance(scale):
    c, u = logits = random_logits(2)
    assert torch.allclose(merge(logits, Guidance(scale, 0.0, 0.0)), u + scale * (c - u), atol=1e-4)


@pytest.mark.parametrize(("text", "image"), [(4.0, 1.5), (0.0, 1.0), (1.0, 0.3)])
def test_image_guidance(text, image):
    c, u, n = logits = random_logits(3)
    assert torch.allclose(merge(logits, Guidance(text, image, 0.0)), u + text * (c - u) + image * (u - n), atol=1e-4)


@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_rescale_draws_the_spread_towards_the_conditional(phi):
    logits = random_logits(2)
    g, rescaled = merge(logits, Guidance(4.0, 0.0, 0.0)), merge(logits, Guidance(4.0, 0.0, phi))
    spread = phi * logits[0].std(-1) + (1 - phi) * g.std(-1)
    assert torch.allclose(rescaled.std(-1), spread, rtol=1e-4)
    assert torch.equal(rescaled.argsort(-1), g.argsort(-1))


def test_defaults_of_drawing_and_editing():
    assert (Guidance().text, Guidance().image, Guidance().rescale) == (2.0, 0.0, 0.7)
    assert (for_editing(None).text, for_editing(None).image) == (4.0, 0.0)
    assert for_editing(Guidance(3.0)) == Guidance(3.0)
