"""Several samples side by side: each is what it is alone, by the oracle, whatever stands beside it."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llada_core.backbone import runner as runners
from llada_core.backbone.cuda_graphs import GraphStore
from llada_core.options import Guidance, Sampling, Sprint
from llada_core.sampling import block_diffusion, unmasker
from llada_core.sampling.batch import Batch, Sample
from llada_core.sampling.block_diffusion import GenerationConfig, Output, generate, prepare

MASK, IMAGES, VOCABULARY = 95, 96, 160
GUIDANCE = Guidance(2.0, 0.5, 0.7)


def random_ids(seed: int, count: int) -> list[int]:
    ids = torch.randint(0, VOCABULARY - 1, (count,), generator=torch.Generator().manual_seed(seed))
    return (ids + (ids >= MASK)).tolist()


def partly_given(seed: int, count: int, share: float) -> list[int]:
    """Image ids of which about a share is given; the rest are masks."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(IMAGES, VOCABULARY, (count,), generator=generator)
    return ids.masked_fill(torch.rand(count, generator=generator) >= share, MASK).tolist()


@pytest.fixture(autouse=True)
def graphs_are_always_worth_it(monkeypatch):
    """So that small batches go on with graphs for fewer rows."""
    monkeypatch.setattr(block_diffusion, "WORTH_GRAPHS", 1)


@pytest.fixture(scope="module")
def slow(oracle, tiny):
    return oracle.Oracle(oracle.written_out(tiny), tiny, MASK)


def together(backbone, samples, config, seeds=None, on_round=None, store=None) -> list[Output]:
    """What samples, (branches, new ids) each, give in one batch."""
    seeds = seeds or range(len(samples))
    made = [
        Sample(branches, new, torch.Generator().manual_seed(seed))
        for (branches, new), seed in zip(samples, seeds, strict=True)
    ]
    runner, batch = prepare(backbone, made, config, MASK, store=store)
    if on_round is not None:
        return generate(runner, batch, config, lambda block, done: on_round(runner, batch, block, done))
    return generate(runner, batch, config)


@st.composite
def batches(draw, branches: int):
    """Samples that differ in prompts, sizes and in what is given of them."""
    samples = []
    for _ in range(draw(st.integers(2, 4))):
        lengths = draw(st.lists(st.integers(1, 110), min_size=branches, max_size=branches))
        seed, count = draw(st.integers(0, 10**6)), draw(st.integers(1, 90))
        share = draw(st.sampled_from([0.0, 0.0, 0.5, 0.95]))
        samples.append(
            ([random_ids(seed + row, length) for row, length in enumerate(lengths)], partly_given(seed, count, share))
        )
    return samples


SPRINTS = st.none() | st.builds(
    Sprint,
    keep_ratio=st.sampled_from([0.3, 0.7]),
    text_keep_ratio=st.sampled_from([None, 1.0]),
    image_keep_ratio=st.sampled_from([None, 0.8]),
    threshold=st.sampled_from([0.3, 0.9]),
    warmup=st.integers(1, 2),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.integers(1, 3).flatmap(batches),
    block=st.integers(8, 40),
    steps=st.integers(1, 7),
    threshold=st.sampled_from([0.3, 0.6, 1.0]),
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
    sprint=SPRINTS,
    prefill=st.sampled_from([16, 1024]),
    fixed=st.booleans(),
)
def test_each_sample_is_what_the_oracle_gives_it_alone(
    samples, block, steps, threshold, temperature, sprint, prefill, fixed, tiny, slow, fixed_shapes, monkeypatch
):
    """Images: other prompts, sizes and given ids beside it, up to three branches, SPRINT, draws."""
    monkeypatch.setattr(runners, "PREFILL", prefill)
    sampling = Sampling(block_length=block, threshold=threshold, temperature=temperature)
    config = GenerationConfig(steps, IMAGES, VOCABULARY, frozenset(), sampling, GUIDANCE, sprint)
    found = together(tiny, samples, config, store=GraphStore() if fixed else None)
    for seed, ((branches, new), output) in enumerate(zip(samples, found, strict=True)):
        expected = slow.generate(branches, new, config, seed=seed)
        assert output.ids == expected.ids
        assert output.rounds == sum(expected.rounds)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 110), min_size=2, max_size=5),
    block=st.integers(8, 40),
    steps=st.integers(1, 9),
    stops=st.frozensets(st.integers(0, MASK - 1), min_size=1, max_size=12),
    temperature=st.sampled_from([0.0, 1.0]),
    fixed=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_texts_that_end_at_different_places(
    lengths, block, steps, stops, temperature, fixed, seed, tiny, slow, fixed_shapes
):
    sampling = Sampling(block_length=block, threshold=0.5, temperature=temperature)
    config = GenerationConfig(steps, 0, IMAGES, stops, sampling)
    samples = [([random_ids(seed + at, length)], [MASK] * (20 + 17 * at)) for at, length in enumerate(lengths)]
    found = together(tiny, samples, config, store=GraphStore() if fixed else None)
    for at, ((branches, new), output) in enumerate(zip(samples, found, strict=True)):
        assert output.ids == slow.generate(branches, new, config, seed=at).ids


def test_nobody_waits_for_others_to_fill_a_block(tiny):
    """Blocks are cut elsewhere in each. Filled together they would take the longest of each of three: 96 rounds."""
    config = GenerationConfig(32, IMAGES, VOCABULARY, sampling=Sampling(threshold=1.0))
    samples = [([random_ids(at, 40 + length)], [MASK] * 64) for at, length in enumerate([22, 24, 30, 31, 32, 35])]
    passes = []
    found = together(tiny, samples, config, on_round=lambda runner, batch, *_: passes.append(len(runner.pads)))
    longest = max(output.rounds for output in found)
    assert 64 <= longest <= len(passes) <= longest + 2 < 96  # one more for each block behind the first, to be cached
    assert [together(tiny, [sample], config)[0] for sample in samples] == found


def test_where_a_third_has_filled_a_block_two_blocks_are_run(tiny):
    """Else what was filled is run by itself."""
    runner, _ = prepare(
        tiny, [Sample([random_ids(at, 64)], [MASK] * 96) for at in range(6)], GenerationConfig(2, 0, IMAGES), MASK
    )
    runner.cached = [64] * 6
    assert runner.turns([96] * 6) == [96] * 6  # all
    assert runner.turns([96, 96, 64, 64, 64, 64]) == [96, 96, 64, 64, 64, 64]
    assert runner.turns([96, 64, 64, 64, 64, 64]) == [64, 64, 64, 64, 64, 64]
    runner.retire([3, 4, 5])
    assert runner.turns([96, 64, 64, 64, 64, 64]) == [96, 64, 64, 64, 64, 64]


def test_logits_of_a_few_samples_at_a_time_change_nothing(tiny, monkeypatch):
    samples = [([random_ids(at, 40), random_ids(at + 9, 20)], [MASK] * 50) for at in range(5)]
    config = GenerationConfig(4, IMAGES, VOCABULARY, sampling=Sampling(temperature=1.0), guidance=GUIDANCE)
    expected = together(tiny, samples, config)
    monkeypatch.setattr(unmasker, "LOGITS", 2 * 32 * (VOCABULARY - IMAGES))
    assert together(tiny, samples, config) == expected


def test_prompts_of_many_lengths_take_few_passes(tiny, monkeypatch):
    """Sixteen, one two blocks longer than another: before the last 512 positions eight of them begin."""
    lengths, config = [40 + 64 * at for at in range(16)], GenerationConfig(1, 0, IMAGES, sampling=Sampling())
    samples = [([random_ids(at, length)], [MASK] * 8) for at, length in enumerate(lengths)]
    ran, forward = [], type(tiny).forward

    def counting(self, ids, *rest):
        ran.append(ids.numel())
        return forward(self, ids, *rest)

    monkeypatch.setattr(type(tiny), "forward", counting)
    found = together(tiny, samples, config)
    assert len(ran) == 3  # the last of them is the round
    few = sum(ran)
    monkeypatch.setattr(runners, "PADDING", 0)
    ran.clear()
    assert together(tiny, samples, config) == found
    assert len(ran) == 9
    assert sum(ran) < few <= sum(ran) + 2 * 1024
    assert [together(tiny, [sample], config)[0] for sample in samples] == found


def test_samples_that_are_done_leave_the_batch(tiny):
    """Nothing is computed for them any more."""
    rows = []
    samples = [([random_ids(at, 30)], [MASK] * count) for at, count in enumerate([10, 100, 40, 70])]
    config = GenerationConfig(2, IMAGES, VOCABULARY, sampling=Sampling(threshold=1.0))
    found = together(tiny, samples, config, on_round=lambda runner, batch, *_: rows.append(len(runner.pads)))
    assert [len(output.ids) for output in found] == [10, 100, 40, 70]
    assert sorted(set(rows), reverse=True) == [4, 3, 2, 1]


def test_with_graphs_they_leave_when_half_of_them_are_done(tiny, fixed_shapes):
    rows = []
    samples = [([random_ids(at, 30)], [MASK] * count) for at, count in enumerate([10, 100, 40, 70])]
    config = GenerationConfig(2, IMAGES, VOCABULARY, sampling=Sampling(threshold=1.0))
    alone = [together(tiny, [sample], config)[0] for sample in samples]
    found = together(
        tiny, samples, config, store=GraphStore(), on_round=lambda runner, *_: rows.append(len(runner.pads))
    )
    assert found == alone
    assert sorted(set(rows), reverse=True) == [4, 2, 1]


def test_given_blocks_take_no_round(tiny):
    """Rounds are spent where something is to be drawn, and what is given stays."""
    new = partly_given(3, 160, 1.0)
    new[70:75] = [MASK] * 5
    blocks = []
    config = GenerationConfig(8, IMAGES, VOCABULARY, sampling=Sampling(threshold=1.0))
    (output,) = together(tiny, [([random_ids(1, 32)], new)], config, on_round=lambda _, __, *at: blocks.append(at))
    assert {block for block, _ in blocks} == {2}
    assert output.rounds == len(blocks) == 2  # four at least a round
    assert [found for found, given in zip(output.ids, new, strict=True) if given != MASK] == [
        given for given in new if given != MASK
    ]
    assert MASK not in output.ids


def test_padding_moves_no_block_boundary():
    samples = [Sample([random_ids(0, a), random_ids(1, b)], [MASK] * 40) for a, b in ((5, 70), (40, 9), (100, 100))]
    batch = Batch(samples, 32, MASK)
    for track, sample in zip(batch.tracks, samples, strict=True):
        alone = Batch([sample], 32, MASK).tracks[0]
        assert (track.begin - alone.begin) % 32 == 0
        assert (track.pad - alone.pad) % 32 == 0
    assert batch.starts[0] == 96


# Going on from what is cached


@pytest.mark.parametrize("sprint", [None, Sprint(text_keep_ratio=0.5, image_keep_ratio=0.5)], ids=["plain", "SPRINT"])
@pytest.mark.parametrize("others", [[20], [20, 31], [300]])
def test_a_sample_goes_on_from_what_another_has_cached(others, sprint, tiny, slow, monkeypatch):
    """As a picture from its plan: what is cached of the prompt is not run again, and nothing else changes."""
    ran = []
    forward = type(tiny).forward

    def counting(self, ids, *rest):
        ran.append(ids.numel())
        return forward(self, ids, *rest)

    text = GenerationConfig(4, 0, IMAGES, frozenset(), Sampling(), None, sprint, keep_prefix=True)
    prompt = random_ids(1, 200)
    (plan,) = together(tiny, [([prompt], [MASK] * 70)], text)
    after = [*prompt, *plan.ids[:50], *random_ids(7, 12)]
    branches = [after, *(random_ids(8 + at, length) for at, length in enumerate(others))]
    config = GenerationConfig(4, IMAGES, VOCABULARY, frozenset(), Sampling(), GUIDANCE, sprint)
    expected = slow.generate(branches, [MASK] * 45, config)
    monkeypatch.setattr(type(tiny), "forward", counting)
    costs = {}
    for prefix in (None, plan.prefix):
        ran.clear()
        runner, batch = prepare(tiny, [Sample(branches, [MASK] * 45, None, prefix)], config, MASK)
        (output,) = generate(runner, batch, config)
        assert output.ids == expected.ids
        costs[prefix is None] = sum(ran)
    longest = max(map(len, branches))
    if longest == len(after):
        assert costs[False] <= costs[True] - 200  # of 262; the rest is other, or shares a block with what is
    else:
        assert costs[False] == costs[True]  # its blocks are cut elsewhere


def test_what_is_cached_of_samples_that_left_is_kept(tiny):
    config = GenerationConfig(3, 0, IMAGES, frozenset(range(20)), Sampling(threshold=0.5), keep_prefix=True)
    samples = [([random_ids(at, 20 + 40 * at)], [MASK] * (200 - 60 * at)) for at in range(3)]
    for (branches, _), output in zip(samples, together(tiny, samples, config), strict=True):
        ids = [*branches[0], *output.ids]
        assert output.prefix.ids == ids[: len(output.prefix.ids)]
        assert len(output.prefix.ids) >= len(ids) - 64
        assert all(keys.shape[1] == len(output.prefix.ids) for keys in output.prefix.keys)
