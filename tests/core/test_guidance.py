"""Classifier-free guidance: which rows a task runs, and how their logits become one."""

import pytest
import torch

from llada_core.backbone.head import Head
from llada_core.options import Guidance
from llada_core.prompts import Prompts
from llada_core.sampling.guidance import combine, guided_branches, rescale
from llada_core.sampling.tasks import for_editing

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


def random_logits(branches: int) -> torch.Tensor:
    return torch.randn(branches, 5, 40, generator=torch.Generator().manual_seed(branches)) * 4


def test_one_branch_is_itself():
    logits = random_logits(1)
    assert torch.equal(combine(logits, Guidance(3.0, 2.0, 0.7)), logits[0])
    assert torch.equal(combine(logits, None), logits[0])


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0, 2.0, 7.5])
def test_text_guidance(scale):
    c, u = logits = random_logits(2)
    assert torch.allclose(combine(logits, Guidance(scale)), u + scale * (c - u), atol=1e-4)


@pytest.mark.parametrize(("text", "image"), [(4.0, 1.5), (0.0, 1.0), (1.0, 0.3)])
def test_image_guidance(text, image):
    c, u, n = logits = random_logits(3)
    assert torch.allclose(combine(logits, Guidance(text, image)), u + text * (c - u) + image * (u - n), atol=1e-4)


def test_samples_are_guided_each_by_itself():
    one, other = random_logits(3), random_logits(3).flip(1)
    both = combine(torch.stack((one, other)), Guidance(3.0, 1.5))
    assert torch.equal(both, torch.stack([combine(logits, Guidance(3.0, 1.5)) for logits in (one, other)]))


@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_rescale_draws_the_spread_towards_the_conditional(phi):
    logits = random_logits(2)
    g = combine(logits, Guidance(4.0))
    c_std, g_std = logits[0].std(-1, keepdim=True), g.std(-1, keepdim=True)
    rescaled = rescale(g, c_std, g_std, Guidance(4.0, 0.0, phi))
    assert torch.allclose(rescaled.std(-1, keepdim=True), phi * c_std + (1 - phi) * g_std, rtol=1e-4)
    assert torch.equal(rescaled.argsort(-1), g.argsort(-1))


# The spread without the logits


def head_of(vocabulary: int, width: int, mean: float = 0.0) -> Head:
    """Heavy tails, directions of very different weight, and a mean that all tokens share, as trained heads have."""
    generator = torch.Generator().manual_seed(vocabulary)
    weight = torch.randn(vocabulary, width, generator=generator) * torch.logspace(0, -2, width)
    weight = weight * torch.rand(vocabulary, 1, generator=generator).pow(-0.4) + mean
    head = Head(width, vocabulary)
    head.weight = torch.nn.Parameter(weight, requires_grad=False)
    return head


@pytest.mark.parametrize("mean", [0.0, 1.0, 30.0])
@pytest.mark.parametrize(("vocabulary", "width"), [(9000, 64), (200, 64), (50, 64), (2, 3)])
def test_spread_without_logits_equals_that_of_all_of_them(vocabulary, width, mean):
    """Also where fewer tokens than dimensions leave it nothing to factorise by, to the precision of float32 logits."""
    head = head_of(vocabulary, width, mean)
    x = torch.randn(3, 7, width, generator=torch.Generator().manual_seed(1))
    expected = (x.double() @ head.weight.double().T).std(-1, keepdim=True)
    found = head.std(x, head.factor(torch.device("cpu")))
    assert torch.allclose(found.double(), expected, rtol=2e-6 * (1 + 20 * mean))


def test_spread_of_guided_logits_is_that_of_guided_hidden_states():
    head, guidance = head_of(3000, 48), Guidance(7.5, 1.5)
    hidden = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(2))
    expected = combine(head(hidden).double(), guidance).std(-1, keepdim=True)
    found = head.std(combine(hidden, guidance), head.factor(torch.device("cpu")))
    assert torch.allclose(found.double(), expected, rtol=1e-5)


def test_a_stretch_of_the_vocabulary_has_the_logits_it_has_among_all():
    head, x = head_of(3000, 48), torch.randn(5, 48, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(head(x, 2000, 2900), head(x)[:, 2000:2900], rtol=1e-5, atol=1e-5)
    assert head(x, 10).shape == (5, 2990)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_have_no_factor(value):
    head = head_of(100, 8)
    head.weight[7, 3] = value
    assert head.factor(torch.device("cpu")) is None


def test_defaults_of_drawing_and_editing():
    assert (Guidance().text, Guidance().image, Guidance().rescale) == (2.0, 0.0, 0.7)
    assert (for_editing(None).text, for_editing(None).image) == (4.0, 0.0)
    assert for_editing(Guidance(3.0)) == Guidance(3.0)
