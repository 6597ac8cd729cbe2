"""The block loop with its prefix cache against the oracle, which recomputes everything every round: equal to the id."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_core.errors import InputError
from llada_core.options import Guidance, Sampling
from llada_core.sampling import diffusion
from llada_core.sampling.diffusion import Canvas, Task

MASK, IMAGES, VOCABULARY = 95, 96, 160


def random_ids(seed: int, count: int, high: int = VOCABULARY) -> list[int]:
    ids = torch.randint(0, high - 1, (count,), generator=torch.Generator().manual_seed(seed))
    return (ids + (ids >= MASK)).tolist()  # any id but the mask


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    return [random_ids(seed + row, length) for row, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def compare(oracle, tiny):
    """compare(prompts, task, ...): run engine and oracle, assert that they agree, return what the engine filled."""
    slow = oracle.Oracle(oracle.written_out(tiny), tiny, MASK)

    def compare(prompts, task, sampling, guidance=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        canvas = Canvas(tiny, prompts, task.count, MASK, sampling, guidance, generator=generator)
        filled = canvas.fill(task)
        expected = slow.fill(prompts, task, sampling, guidance, seed=seed)
        assert filled.ids == expected.ids
        if not task.stops:
            assert filled.rounds == sum(expected.rounds)
        return filled

    return compare


@st.composite
def generations(draw):
    block = draw(st.integers(8, 64))
    exact = st.integers(1, 3).map(lambda blocks: blocks * block)
    lengths = draw(st.lists(st.integers(1, 120) | exact, min_size=1, max_size=3))
    sampling = Sampling(block_length=block, threshold=draw(st.sampled_from([0.0, 0.3, 0.6, 0.95, 1.0])))
    guidance = Guidance(
        draw(st.sampled_from([0.0, 1.0, 2.0, 4.0])),
        draw(st.sampled_from([0.5, 1.5])),
        draw(st.sampled_from([0.0, 0.7, 1.0])),
    )
    task = Task(draw(st.integers(1, 2 * block + 5)), draw(st.integers(1, 10)), IMAGES, VOCABULARY)
    return prompts_of(lengths, draw(st.integers(0, 10**6))), task, sampling, guidance


@settings(max_examples=60)
@given(case=generations())
def test_images_equal_the_oracle(case, compare):
    prompts, task, sampling, guidance = case
    filled = compare(prompts, task, sampling, guidance)
    assert len(filled.ids) == task.count
    assert all(IMAGES <= token < VOCABULARY for token in filled.ids)


@settings(max_examples=40)
@given(
    length=st.integers(1, 90),
    block=st.integers(8, 40),
    count=st.integers(1, 90),
    steps=st.integers(1, 12),
    stops=st.frozensets(st.integers(0, MASK - 1), min_size=1, max_size=12),
    seed=st.integers(0, 10**6),
)
def test_text_with_early_stop_equals_the_oracle_without(length, block, count, steps, stops, seed, compare):
    task = Task(count, steps, 0, IMAGES, stops)
    filled = compare([random_ids(seed, length)], task, Sampling(block_length=block, threshold=0.5))
    assert filled.stopped == (filled.ids[-1] in stops and MASK not in filled.ids)
    assert not stops & set(filled.ids[: filled.ids.index(MASK) if MASK in filled.ids else -1])


def test_mask_tokens_of_a_prompt_are_not_filled(compare):
    # A plan that ran out of rounds leaves masks behind, and becomes part of the next prompt.
    prompt = [*random_ids(1, 40), MASK, 7, MASK]
    compare([prompt, random_ids(2, 43)], Task(30, 4, IMAGES, VOCABULARY), Sampling(), Guidance(2.0))


def test_early_stop_saves_rounds(tiny):
    # Steps of one token each, and any id of the lower half ends the text: the first block cannot need all its rounds.
    task = Task(64, 32, 0, IMAGES, frozenset(range(48)))
    prompt = [random_ids(3, 32)]
    filled = Canvas(tiny, prompt, 64, MASK, Sampling(threshold=1.0)).fill(task)
    assert filled.stopped
    assert filled.rounds < 32


@pytest.mark.parametrize(
    ("lengths", "count"),
    [
        ([64, 64], 32),  # prompts that fill blocks exactly: nothing of the prompt is recomputed
        ([64, 64], 45),  # a grid that ends in mid-block
        ([33, 95], 40),  # the conditional row is shorter than its unconditional twin
        ([7, 60, 31], 33),  # padding of the conditional row reaches into the first block to fill: it is not to fill
        ([7, 96, 31], 33),  # rows that are nothing but padding for whole blocks
        ([1, 1, 1], 1),
        ([95, 96, 97], 64),
    ],
)
@pytest.mark.parametrize("prefill", [32, 1024])
def test_rows_and_prefill(lengths, count, prefill, compare, monkeypatch):
    monkeypatch.setattr(diffusion, "PREFILL", prefill)
    task = Task(count, 5, IMAGES, VOCABULARY)
    compare(prompts_of(lengths), task, Sampling(threshold=0.4), Guidance(2.0, 0.5, 0.7))


@pytest.mark.parametrize("prefill", [1, 48, 100])
def test_long_prompts_go_in_parts_that_are_no_multiple_of_the_block(prefill, compare, monkeypatch):
    monkeypatch.setattr(diffusion, "PREFILL", prefill)
    task = Task(70, 4, IMAGES, VOCABULARY)
    compare(prompts_of([333, 250]), task, Sampling(block_length=24, threshold=0.4), Guidance(2.0))


@settings(max_examples=20)
@given(
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    seed=st.integers(0, 2**63),
)
def test_draws_equal_the_oracle(temperature, top_k, top_p, seed, compare):
    sampling = Sampling(threshold=0.5, temperature=temperature, top_k=top_k, top_p=top_p)
    compare(prompts_of([40, 20]), Task(40, 4, IMAGES, VOCABULARY), sampling, Guidance(1.5), seed)


def test_finished_blocks_are_never_run_again(tiny, monkeypatch):
    """The point of the cache: after its prompt, a block of b positions costs b positions a round, plus b once."""
    sizes = []
    forward = type(tiny).forward
    monkeypatch.setattr(
        type(tiny), "forward", lambda self, ids, *rest: sizes.append(ids.shape[1]) or forward(self, ids, *rest)
    )
    task = Task(96, 4, IMAGES, VOCABULARY)
    Canvas(tiny, [random_ids(1, 64)], 96, MASK, Sampling(threshold=1.0)).fill(task)
    assert sizes == [96, 32, 32, 32, 64, 32, 32, 32, 64, 32, 32, 32]


def test_rounds_are_reported_with_their_block(tiny):
    seen = []
    task = Task(40, 2, IMAGES, VOCABULARY)
    canvas = Canvas(tiny, [random_ids(1, 30)], 40, MASK, Sampling(threshold=1.0))
    canvas.fill(task, lambda canvas, block, done: seen.append((block, done)))
    assert seen == [(0, 1), (1, 1), (1, 2), (2, 1), (2, 2)]  # 2 masks in the first block: one round's quota of 16


def test_a_canvas_leaves_the_global_generator_alone(tiny):
    before = torch.get_rng_state()
    task = Task(40, 4, IMAGES, VOCABULARY)
    draws = torch.Generator().manual_seed(5)
    Canvas(tiny, [random_ids(1, 30)], 40, MASK, Sampling(temperature=1.0), generator=draws).fill(task)
    assert torch.equal(torch.get_rng_state(), before)


def test_predictions_out_of_range_are_an_error_before_anything_is_kept(tiny, monkeypatch):
    """As float16 leaves them where it overflows: better no picture than one of noise."""
    monkeypatch.setattr(tiny.lm_head, "forward", lambda x: torch.full((*x.shape[:-1], VOCABULARY), float("nan")))
    canvas = Canvas(tiny, [random_ids(1, 30)], 40, MASK, Sampling())
    with pytest.raises(InputError, match=r"precision: found numbers beyond the range of torch\.float32"):
        canvas.fill(Task(40, 4, IMAGES, VOCABULARY))
    assert (canvas.ids[0, 30:] == MASK).all()
