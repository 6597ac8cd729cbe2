"""decoder/flow.py: samplers on fields whose answer is known. The goldens' numbers are in test_pixels.py."""

import logging
from itertools import count, islice, pairwise, repeat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llada_core.decoder.flow import (
    guide,
    has_float64,
    noise_stream,
    normal_times,
    sample_normal,
    sample_turbo,
    turbo_times,
)
from llada_core.progress import Interrupted

SHAPE = (1, 4, 1, 6, 8)
seeds = st.integers(0, 2**64 - 1)


def draw(seed: int) -> torch.Tensor:
    return next(noise_stream(seed, SHAPE))


# Times


@given(st.integers(2, 200))
def test_normal_times_rise_from_noise_to_image(steps):
    times = normal_times(steps)
    assert len(times) == steps
    assert times[0] == 0
    assert times[-1] == 1
    gaps = [after - t for t, after in pairwise(times)]
    assert all(gap > 0 for gap in gaps)
    assert gaps == sorted(gaps), "the steps are finest near the noise"


def test_normal_times_are_warped():
    assert normal_times(5) == pytest.approx([0, 0.25 / 4.75, 0.5 / 3.5, 0.75 / 2.25, 1])


@given(st.integers(1, 200))
def test_turbo_times_are_even(steps):
    times = turbo_times(steps)
    assert len(times) == steps + 1
    assert times == pytest.approx([i / steps for i in range(steps + 1)])


# Samplers


def straight(target: torch.Tensor):
    """The field whose paths run straight to `target` from wherever they are."""
    return lambda x, t: (target - x) / (1 - t)


@given(seeds, st.integers(2, 60))
def test_normal_follows_a_straight_path_to_its_end(seed, steps):
    target = draw(seed)
    x = sample_normal(straight(target), draw(seed + 1), normal_times(steps))
    assert x.dtype == torch.float32
    assert torch.allclose(x, target, atol=1e-4)


@given(seeds, st.integers(1, 20))
def test_turbo_reaches_the_image_whatever_the_noise(seed, steps):
    target = draw(seed)
    x = sample_turbo(straight(target), draw(seed + 1), turbo_times(steps), noise_stream(seed + 2, SHAPE))
    assert x.dtype == torch.float32
    assert torch.allclose(x, target, atol=1e-5)


def test_normal_is_euler():
    # v = x: each step multiplies by 1 + its length.
    x = sample_normal(lambda x, t: x, torch.ones(SHAPE), [0.0, 0.25, 0.5, 1.0])
    assert torch.allclose(x, torch.full(SHAPE, 1.25 * 1.25 * 1.5))


def test_turbo_noises_the_estimate_anew():
    # v = 0, so the estimate is x itself: x becomes t'·x + (1 - t')·noise, by hand for two rounds.
    x = sample_turbo(lambda x, t: 0 * x, torch.full(SHAPE, 8.0), [0.0, 0.25, 1.0], repeat(torch.ones(SHAPE)))
    assert torch.allclose(x, torch.full(SHAPE, 0.25 * 8 + 0.75))


@given(st.integers(2, 40))
def test_normal_evaluates_once_less_than_its_steps(steps):
    seen = []
    sample_normal(lambda x, t: seen.append(t) or x, torch.ones(SHAPE), normal_times(steps))
    assert seen == normal_times(steps)[:-1]
    assert len(seen) == steps - 1


@given(st.integers(1, 40))
def test_turbo_evaluates_once_and_draws_once_a_round(steps):
    seen, drawn = [], count()
    noise = (torch.zeros(SHAPE) for _ in drawn)
    sample_turbo(lambda x, t: seen.append(t) or x, torch.ones(SHAPE), turbo_times(steps), noise)
    assert seen == turbo_times(steps)[:-1]
    assert len(seen) == next(drawn) == steps


def test_turbo_keeps_its_state_in_float64_and_normal_in_float32():
    seen = {"normal": set(), "turbo": set()}
    x = torch.ones(SHAPE)
    sample_normal(lambda x, t: seen["normal"].add(x.dtype) or x.float(), x, normal_times(4))
    sample_turbo(lambda x, t: seen["turbo"].add(x.dtype) or x.float(), x, turbo_times(4), noise_stream(0, SHAPE))
    assert seen == {"normal": {torch.float32}, "turbo": {torch.float64}}


def test_a_device_without_float64_is_found_by_asking_it(caplog):
    """The meta device stands for it: what cannot be computed and read back there is an error, as on those devices."""
    caplog.set_level(logging.INFO)
    assert has_float64(torch.device("cpu"))
    assert not caplog.records
    assert not has_float64(torch.device("meta"))
    assert "float32" in caplog.text
    seen = []
    x = torch.ones(SHAPE, device="meta")
    noise = (torch.zeros(SHAPE) for _ in count())
    sample_turbo(lambda x, t: seen.append(x.dtype) or x, x, turbo_times(3), noise)
    assert seen == [torch.float32] * 3


def test_the_last_noise_has_no_weight_and_the_others_have():
    def run(changed: int) -> torch.Tensor:
        noise = list(islice(noise_stream(1, SHAPE), 3))
        noise[changed] = noise[changed] + 1
        return sample_turbo(lambda x, t: -x, torch.ones(SHAPE), turbo_times(3), iter(noise))

    assert torch.equal(run(2), sample_turbo(lambda x, t: -x, torch.ones(SHAPE), turbo_times(3), noise_stream(1, SHAPE)))
    assert not torch.equal(run(1), run(2))
    assert not torch.equal(run(0), run(2))


# Guidance


@given(seeds, st.floats(0, 20))
def test_guidance_points_away_from_the_unconditional_and_never_grows(seed, scale):
    p, n = draw(seed), draw(seed + 1)
    guided, plain = guide(p, n, scale), p + scale * (p - n)
    assert guided.norm() <= p.norm() * (1 + 1e-5)
    assert torch.cosine_similarity(guided.flatten(), plain.flatten(), 0) == pytest.approx(1, abs=1e-4)
    if plain.norm() <= p.norm():
        assert torch.allclose(guided, plain)


def test_guidance_keeps_a_shorter_sum():
    p = torch.ones(SHAPE)
    assert torch.allclose(guide(p, 1.5 * p, 1.0), 0.5 * p)


def test_guidance_caps_the_norm_of_the_whole_tensor():
    p, n = torch.zeros(1, 2, 1, 1, 1), torch.zeros(1, 2, 1, 1, 1)
    p[0, 0], n[0, 1] = 3.0, 4.0
    # p + (p - n) = (6, -4), norm sqrt(52), brought down to 3.
    assert torch.allclose(guide(p, n, 1.0).flatten(), torch.tensor([6.0, -4.0]) * 3 / 52**0.5)


def test_guidance_of_nothing_is_nothing():
    zero = torch.zeros(SHAPE)
    assert torch.equal(guide(zero, zero, 1.0), zero)


# Noise


@given(seeds)
def test_noise_is_one_generators_draws_in_order(seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    for noise in islice(noise_stream(seed, SHAPE), 3):
        assert noise.dtype == torch.float32
        assert noise.device.type == "cpu"
        assert torch.equal(noise, torch.randn(SHAPE, generator=generator))


@given(seeds, seeds)
def test_noise_neither_reads_nor_moves_the_global_generator(seed, other):
    torch.manual_seed(other)
    before = torch.get_rng_state()
    noise = draw(seed)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(other // 2 + 1)
    assert torch.equal(draw(seed), noise)


def test_seeds_differ_and_wrap():
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(draw(2**64 + 5), draw(5))


# Progress


@pytest.mark.parametrize("kind", ["normal", "turbo"])
def test_every_round_reports_and_shows_the_estimate(kind):
    target, reports, previews = draw(3), [], []

    def listen(progress):
        reports.append((progress.done, progress.total, progress.stage))
        previews.append(progress.preview)  # called later: by then the sampler has moved on

    if kind == "normal":
        sample_normal(straight(target), draw(4), normal_times(5), listen)
    else:
        sample_turbo(straight(target), draw(4), turbo_times(4), noise_stream(5, SHAPE), listen)
    assert reports == [(i, 4, "decoder") for i in (1, 2, 3, 4)]
    for preview in previews:
        estimate = preview()
        assert estimate.dtype == torch.float32
        assert estimate.shape == (1, 4, 6, 8)
        assert torch.allclose(estimate, target[:, :, 0], atol=1e-4)


@pytest.mark.parametrize("kind", ["normal", "turbo"])
def test_a_listener_can_stop_the_work(kind):
    seen = []

    def velocity(x, t):
        seen.append(t)
        return x

    def run():
        if kind == "normal":
            return sample_normal(velocity, draw(0), normal_times(9), lambda p: p.done < 3)
        return sample_turbo(velocity, draw(0), turbo_times(8), noise_stream(1, SHAPE), lambda p: p.done < 3)

    with pytest.raises(Interrupted):
        run()
    assert len(seen) == 3
