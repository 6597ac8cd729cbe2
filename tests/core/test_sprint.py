"""SPRINT: what is kept of the prefix, how it is scored, and the schedule, against the oracle's full passes."""

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from llada_core.backbone import attention_kernels
from llada_core.backbone import runner as runners
from llada_core.backbone.runner import top_probability
from llada_core.options import Guidance, Sampling, Sprint
from llada_core.sampling.block_diffusion import GenerationConfig
from llada_core.sampling.sprint import kept_positions, least_accepted, scores

MASK, IMAGES, VOCABULARY = 95, 96, 160
KINDS = ["low_confidence", "top_k_margin", "neg_entropy"]
EDIT = Guidance(2.0, 0.5, 0.7)
COUNT = 70  # positions to fill where a test does not vary it


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Prompts of text and image ids."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, VOCABULARY - 1, (n,), generator=generator) for n in lengths]
    return [(row + (row >= MASK)).tolist() for row in rows]


@pytest.fixture(scope="module")
def slow(oracle, tiny):
    return oracle.Oracle(oracle.written_out(tiny), tiny, MASK)


def drawing(steps: int, sprint: Sprint, sampling: Sampling | None = None, guidance=EDIT) -> GenerationConfig:
    return GenerationConfig(steps, IMAGES, VOCABULARY, frozenset(), sampling or Sampling(), guidance, sprint)


@pytest.fixture(scope="module")
def compare(tiny, slow, generate_one):
    """compare(prompts, count, config, **options of the oracle): assert that ids and rounds are the oracle's."""

    def compare(prompts, count, config, **options):
        output = generate_one(tiny, prompts, count, config).output
        expected = slow.generate(prompts, [MASK] * count, config, **options)
        assert output.ids == expected.ids
        if not config.stops:
            assert output.rounds == sum(expected.rounds)

    return compare


# The whole run


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=3),
    block=st.integers(8, 48),
    count=st.integers(1, 100),
    steps=st.integers(1, 7),
    text=st.sampled_from([None, 0.0, 0.3, 0.8, 1.0]),
    image=st.sampled_from([None, 0.0, 0.5, 0.8, 1.0]),
    warmup=st.integers(0, 2),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
    kind=st.sampled_from(KINDS),
    threshold=st.sampled_from([0.2, 0.5, 0.93]),
    seed=st.integers(0, 10**6),
)
@example(
    lengths=[1, 84, 58],  # the first row's padding reaches into the block
    block=10,
    count=1,
    steps=2,
    text=0.8,
    image=0.8,
    warmup=0,
    alpha=0.0,
    kind="low_confidence",
    threshold=0.2,
    seed=2299,
)
def test_pruned_runs_equal_the_oracle(
    lengths, block, count, steps, text, image, warmup, alpha, kind, threshold, seed, compare
):
    """Rounds over gathered prefixes equal full forwards with the hidden positions masked out, one to three rows."""
    # A block of masks that sees nothing else predicts the same everywhere: which is best is a matter of rounding.
    assume((warmup, text, image) != (0, 0.0, 0.0))
    sprint = Sprint(0.6, text, image, threshold, warmup, alpha, kind)
    compare(prompts_of(lengths, seed), count, drawing(steps, sprint, Sampling(block_length=block)))


@pytest.mark.parametrize("warmup", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[50], [40, 64, 30]])
def test_ratios_of_one_equal_the_schedule_without_pruning(warmup, kind, lengths, compare):
    sprint = Sprint(text_keep_ratio=1.0, image_keep_ratio=1.0, warmup=warmup, confidence=kind, threshold=0.5)
    compare(prompts_of(lengths), COUNT, drawing(5, sprint), prune=False)


def test_pruning_changes_something(slow):
    """So that the tests above compare runs that were pruned."""
    prompts, config = prompts_of([80]), drawing(5, Sprint(text_keep_ratio=0.3, image_keep_ratio=0.3))
    new = [MASK] * COUNT
    assert slow.generate(prompts, new, config).ids != slow.generate(prompts, new, config, prune=False).ids


@pytest.mark.parametrize("prefill", [16, 40])
def test_scores_are_complete_when_a_prompt_goes_in_parts(prefill, compare, monkeypatch):
    monkeypatch.setattr(runners, "PREFILL", prefill)
    monkeypatch.setattr(runners, "SCORED", 24)
    compare(prompts_of([200, 150]), COUNT, drawing(5, Sprint(text_keep_ratio=0.5, image_keep_ratio=0.5)))


def test_text_stops_early_under_sprint(compare):
    sprint = Sprint(text_keep_ratio=0.5, threshold=0.6)
    config = GenerationConfig(6, 0, IMAGES, frozenset(range(6)), Sampling(), EDIT, sprint)
    for seed in range(5):
        compare(prompts_of([45], seed), 90, config)


# Scores


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_stored_scores_equal_a_full_pass(alpha, tiny, slow, generate_one):
    """Norms and confidences stored when blocks were finished are those of a pass over everything at the end."""
    prompts = prompts_of([40, 70, 55])
    generated = generate_one(tiny, prompts, 90, drawing(4, Sprint(text_keep_ratio=0.5)))
    runner, ids = generated.runner, generated.batch.rows
    start = 128  # the run ends at 160: its last block is never committed
    assert min(runner.cached) >= start
    at = torch.arange(start)
    real = at >= runner.pads[:, None]
    visible = (at[:, None] // 32 >= at // 32) & (real[:, None] | torch.eye(start).bool())
    expected = slow.scores(ids[:, :start], runner.positions[:, :start], visible, real, alpha)
    stored = scores(runner.cache.key_norms[:, :start], runner.confidence[:, :start], real, alpha)
    assert torch.allclose(stored[real], expected[real], rtol=1e-4, atol=1e-5)


def test_key_norms_are_relative_to_the_visible_mean():
    norms = torch.tensor([[100.0, 1.0, 3.0]])  # the first position is padding and must not count
    visible = torch.tensor([[False, True, True]])
    score = scores(norms, torch.tensor([[0.0, 0.4, 0.8]]), visible, alpha=0.5)
    assert score[0, 1:].tolist() == pytest.approx([0.5 * 0.5 + 0.5 * 0.4, 0.5 * 1.5 + 0.5 * 0.8])


def test_top_probability_equals_softmax():
    logits = torch.randn(5, 7, 90, generator=torch.Generator().manual_seed(0)) * 30
    assert torch.allclose(top_probability(logits), logits.softmax(-1).amax(-1))


# What is kept


@given(
    rows=st.integers(1, 3),
    prefix=st.integers(1, 60),
    text=st.sampled_from([None, 0.0, 0.1, 0.3, 0.7, 0.8, 1.0]),
    image=st.sampled_from([None, 0.0, 0.2, 0.6, 0.8, 0.9, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_kept_counts_and_ranks(rows, prefix, text, image, seed):
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(rows, prefix, generator=generator)
    visible = torch.arange(prefix) >= torch.randint(0, prefix, (rows, 1), generator=generator)
    is_image = torch.rand(rows, prefix, generator=generator) < 0.5
    sprint = Sprint(keep_ratio=0.5, text_keep_ratio=text, image_keep_ratio=image)
    kept = kept_positions(score, visible, is_image, sprint)
    flags = visible.clone()
    if kept is not None:
        positions, real = kept
        flags = torch.zeros_like(visible)
        for row in range(rows):
            chosen = positions[row][real[row]].tolist()
            assert chosen == sorted(set(chosen)), "in order, none twice: the cache is gathered with them"
            flags[row, chosen] = True
    assert not bool((flags & ~visible).any())
    for ratio, images in ((text, False), (image, True)):
        percent = round(100 * (0.5 if ratio is None else ratio))
        for row in range(rows):
            group = visible[row] & (is_image[row] == images)
            inside, outside = score[row][group & flags[row]], score[row][group & ~flags[row]]
            assert len(inside) == int(group.sum()) * percent // 100, "the floor, without binary rounding"
            assert not len(inside) or not len(outside) or inside.min() > outside.max()


@pytest.mark.parametrize(("percent", "count"), [(53, 100), (65, 180), (21, 300), (80, 5), (29, 100), (13, 900)])
def test_floors_are_those_of_decimal_numbers(percent, count):
    """In float32 0.53 x 100 is below 53."""
    everything = torch.ones(1, count, dtype=torch.bool)
    sprint = Sprint(text_keep_ratio=percent / 100)
    positions, _ = kept_positions(torch.rand(1, count), everything, ~everything, sprint)
    assert positions.shape[1] == percent * count // 100


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_only_rounds_after_the_warmup_see_less(warmup, tiny, generate_one):
    """A round over the pruned prefix attends to block + kept keys, any other to everything before the block's end."""
    seen = []

    def attend(q, k, v, bias):
        seen.append(k.shape[2])
        return attention_kernels.sdpa(q, k, v, bias)

    sprint = Sprint(text_keep_ratio=0.5, image_keep_ratio=0.5, warmup=warmup, threshold=1.0)
    prompts = [list(range(64))]  # text alone: 32 of 64 are kept
    generate_one(tiny, prompts, 32, drawing(4, sprint), attend=attend)
    by_round = seen[:: len(tiny.layers)]
    first_pass_over_prefix = [64] * (warmup == 0)  # there is no full round to fill the cache
    assert by_round == first_pass_over_prefix + [96] * warmup + [64] * (4 - warmup)


# The schedule


@given(st.integers(1, 200), st.integers(1, 40))
def test_least_accepted_finishes_in_time_and_evenly(remaining, steps):
    counts = []
    for left in range(steps, 0, -1):
        counts.append(int(least_accepted(torch.tensor([remaining - sum(counts)]), left)))
        assert counts[-1] == math.ceil((remaining - sum(counts[:-1])) / left)
    assert sum(counts) == remaining
    assert max(counts) - min(counts) <= 1


def test_schedule_counts_what_is_left_not_the_block(tiny, generate_one):
    """20 masks over 5 rounds at an unreachable threshold: 4 a round, where plain sampling would accept 6 or 7."""
    left = []
    config = drawing(5, Sprint(threshold=1.0), guidance=None)

    def note(now, block, done):
        left.append(int((now.batch.block(32)[now.batch.fillable(32)] == MASK).sum()))

    generate_one(tiny, prompts_of([44]), 20, config, on_round=note)
    assert left == [16, 12, 8, 4, 0]
