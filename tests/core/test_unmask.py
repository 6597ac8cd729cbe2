"""One round of unmasking: quotas, acceptance, the three confidences, and draws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llada_core.options import CONFIDENCE_KINDS, Sampling
from llada_core.sampling.batch import Batch, Sample
from llada_core.sampling.block_diffusion import draws
from llada_core.sampling.unmask import _draw, _truncate, accept, predict, quota

seeds = st.integers(0, 10**6)


def random_logits(seed: int, n: int = 6, candidates: int = 50) -> torch.Tensor:
    return torch.randn(n, candidates, generator=torch.Generator().manual_seed(seed)) * 3


def accept_one(confidence: torch.Tensor, masked: torch.Tensor, threshold: float, least: int) -> torch.Tensor:
    """`accept` for one sample; beside it stands another, which must not matter."""
    other = confidence.flip(0)
    both = accept(
        torch.stack((other, confidence)), torch.stack((masked.flip(0), masked)), threshold, torch.tensor([1, least])
    )
    return both[1]


@given(st.integers(1, 64), st.integers(1, 100))
def test_quotas_fill_the_block_evenly_with_the_larger_first(steps, block):
    quotas = [quota(step, steps, block) for step in range(steps)]
    assert sum(quotas) == block
    assert quotas == sorted(quotas, reverse=True)
    assert quotas[0] - quotas[-1] <= 1


@given(
    confidence=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40),
    threshold=st.floats(0, 1, width=32),
    least=st.integers(0, 45),
    seed=seeds,
)
def test_accepted_positions(confidence, threshold, least, seed):
    confidence = torch.tensor(confidence)
    masked = torch.rand(len(confidence), generator=torch.Generator().manual_seed(seed)) < 0.6
    fixed = accept_one(confidence, masked, threshold, least)
    assert not bool((fixed & ~masked).any())
    above = masked & (confidence > threshold)
    if int(above.sum()) >= least:
        assert torch.equal(fixed, above)
    else:
        assert int(fixed.sum()) == min(least, int(masked.sum()))
        assert bool((fixed & above).eq(above).all())
        rest = confidence[masked & ~fixed]
        assert not len(rest) or rest.max() <= confidence[fixed].min()


def test_a_confidence_at_the_threshold_is_not_above_it():
    assert accept_one(torch.tensor([0.5, 0.6]), torch.tensor([True, True]), 0.5, 0).tolist() == [False, True]


def test_best_of_the_masked_not_of_all():
    fixed = accept_one(torch.tensor([0.9, 0.2, 0.8, 0.1]), torch.tensor([False, True, False, True]), 1.0, 1)
    assert fixed.tolist() == [False, True, False, False]


@given(seeds)
def test_without_temperature_the_best_is_chosen(seed):
    logits = random_logits(seed)
    probabilities = logits.double().softmax(-1)
    ordered = probabilities.sort(-1, descending=True).values
    expected = {
        "low_confidence": ordered[:, 0],
        "top_k_margin": ordered[:, 0] - ordered[:, 1],
        "neg_entropy": (probabilities * probabilities.log()).sum(-1),
    }
    assert set(expected) == set(CONFIDENCE_KINDS)
    for kind in CONFIDENCE_KINDS:
        chosen, confidence = predict(logits, Sampling(), kind)
        assert torch.equal(chosen, logits.argmax(-1))
        assert torch.allclose(confidence.double(), expected[kind], atol=1e-5)


def test_entropy_of_impossible_candidates_is_zero():
    logits = torch.tensor([[0.0, 0.0, float("-inf")]])
    _, confidence = predict(logits, Sampling(), "neg_entropy", None)
    assert confidence.item() == pytest.approx(-torch.tensor(2.0).log().item())


@given(seeds, st.sampled_from([0.2, 1.0, 3.0]))
def test_confidence_of_a_draw_is_its_probability(seed, temperature):
    logits = random_logits(seed)
    uniform = torch.rand(len(logits), generator=torch.Generator().manual_seed(seed))
    chosen, confidence = predict(logits, Sampling(temperature=temperature), "low_confidence", uniform)
    expected = (logits / temperature).softmax(-1).gather(-1, chosen[:, None])[:, 0]
    assert torch.allclose(confidence, expected)


@given(seeds, st.integers(1, 60))
def test_top_k_keeps_the_best_k(seed, k):
    logits = random_logits(seed)
    kept = _truncate(logits, k, 1.0) > float("-inf")
    for row, flags in zip(logits, kept, strict=True):
        assert set(flags.nonzero()[:, 0].tolist()) == set(row.argsort(descending=True)[:k].tolist())


@given(seeds, st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_that_reach_the_mass(seed, p):
    logits = random_logits(seed)
    kept = _truncate(logits, 0, p) > float("-inf")
    for row, flags in zip(logits.double().softmax(-1), kept, strict=True):
        mass = row[flags].sum().item()
        assert mass >= p - 1e-5
        assert mass - row[flags].min().item() < p + 1e-5
        assert row[flags].min() >= row[~flags].max()


def test_top_k_and_top_p_keep_the_logits_they_keep():
    logits = random_logits(1)
    cut = _truncate(logits, 5, 0.8)
    kept = cut > float("-inf")
    assert torch.equal(cut[kept], logits[kept])
    assert 1 <= int(kept.sum(-1).min()) <= int(kept.sum(-1).max()) <= 5


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    count = 40_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    chosen = _draw(probabilities.expand(count, -1), uniform)
    found = torch.bincount(chosen, minlength=6) / count
    assert found[1] == found[5] == 0
    deviation = (probabilities * (1 - probabilities) / count).sqrt()
    assert bool(((found - probabilities).abs() <= 4 * deviation).all())


def test_an_impossible_candidate_is_never_drawn_at_either_end():
    """Uniform numbers at both ends of 0...1, where rounding would step onto a neighbour without probability."""
    probabilities = torch.tensor([[0.0, 0.4, 0.6, 0.0]] * 2)
    assert _draw(probabilities, torch.tensor([0.0, 1.0])).tolist() == [1, 2]


def test_a_seed_repeats_its_draws_whatever_else_draws():
    """And whatever stands beside it: each sample draws from a generator of its own, and none while it waits."""

    def batch(*seeds: int) -> Batch:
        samples = [Sample([[1, 2]], [95] * 60, torch.Generator().manual_seed(seed)) for seed in seeds]
        return Batch(samples, 32, 95)

    alone = batch(7)
    first, second = (draws(alone, [True])[0] for _ in range(2))
    beside = batch(3, 7)
    torch.rand(10)
    assert torch.equal(draws(beside, [True, True])[1], first)
    draws(beside, [True, False])
    assert torch.equal(draws(beside, [False, True])[1], second)
