"""The block loop with its prefix cache against the oracle, which recomputes everything every round: equal to the id."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_core.backbone import runner
from llada_core.errors import CheckpointError, InputError
from llada_core.options import Guidance, Sampling
from llada_core.sampling.block_diffusion import GenerationConfig

MASK, IMAGES, VOCABULARY = 95, 96, 160


def random_ids(seed: int, count: int, high: int = VOCABULARY) -> list[int]:
    ids = torch.randint(0, high - 1, (count,), generator=torch.Generator().manual_seed(seed))
    return (ids + (ids >= MASK)).tolist()  # any id but the mask


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    return [random_ids(seed + row, length) for row, length in enumerate(lengths)]


def image(steps: int, sampling: Sampling | None = None, guidance: Guidance | None = None) -> GenerationConfig:
    return GenerationConfig(steps, IMAGES, VOCABULARY, sampling=sampling or Sampling(), guidance=guidance)


@pytest.fixture(scope="module")
def compare(oracle, tiny, generate_one):
    """compare(prompts, count, config): run engine and oracle, assert that they agree, return what the engine gave."""
    slow = oracle.Oracle(oracle.written_out(tiny), tiny, MASK)

    def compare(prompts, count, config, seed=0):
        output = generate_one(tiny, prompts, count, config, seed=seed).output
        expected = slow.generate(prompts, [MASK] * count, config, seed=seed)
        assert output.ids == expected.ids
        if not config.stops:
            assert output.rounds == sum(expected.rounds)
        return output

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
    count, config = draw(st.integers(1, 2 * block + 5)), image(draw(st.integers(1, 10)), sampling, guidance)
    return prompts_of(lengths, draw(st.integers(0, 10**6))), count, config


@settings(max_examples=60)
@given(case=generations())
def test_images_equal_the_oracle(case, compare):
    prompts, count, config = case
    output = compare(prompts, count, config)
    assert len(output.ids) == count
    assert all(IMAGES <= token < VOCABULARY for token in output.ids)


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
    config = GenerationConfig(steps, 0, IMAGES, stops, Sampling(block_length=block, threshold=0.5))
    output = compare([random_ids(seed, length)], count, config)
    assert output.stopped == (output.ids[-1] in stops and MASK not in output.ids)
    assert not stops & set(output.ids[: output.ids.index(MASK) if MASK in output.ids else -1])


def test_mask_tokens_of_a_prompt_are_not_filled(compare):
    # A plan that ran out of rounds leaves masks behind, and becomes part of the next prompt.
    prompt = [*random_ids(1, 40), MASK, 7, MASK]
    compare([prompt, random_ids(2, 43)], 30, image(4, guidance=Guidance(2.0)))


def test_early_stop_saves_rounds(tiny, generate_one):
    # Steps of one token each, and any id of the lower half ends the text: the first block cannot need all its rounds.
    config = GenerationConfig(32, 0, IMAGES, frozenset(range(48)), Sampling(threshold=1.0))
    output = generate_one(tiny, [random_ids(3, 32)], 64, config).output
    assert output.stopped
    assert output.rounds < 32


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
    monkeypatch.setattr(runner, "PREFILL", prefill)
    compare(prompts_of(lengths), count, image(5, Sampling(threshold=0.4), Guidance(2.0, 0.5, 0.7)))


@pytest.mark.parametrize("prefill", [1, 48, 100])
def test_long_prompts_go_in_parts_that_are_no_multiple_of_the_block(prefill, compare, monkeypatch):
    monkeypatch.setattr(runner, "PREFILL", prefill)
    compare(prompts_of([333, 250]), 70, image(4, Sampling(block_length=24, threshold=0.4), Guidance(2.0)))


@settings(max_examples=20)
@given(
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    seed=st.integers(0, 2**63),
)
def test_draws_equal_the_oracle(temperature, top_k, top_p, seed, compare):
    sampling = Sampling(threshold=0.5, temperature=temperature, top_k=top_k, top_p=top_p)
    compare(prompts_of([40, 20]), 40, image(4, sampling, Guidance(1.5)), seed)


def test_finished_blocks_are_never_run_again(tiny, generate_one, monkeypatch):
    """The point of the cache: after its prompt, a block of b positions costs b positions a round, plus b once."""
    sizes = []
    forward = type(tiny).forward
    monkeypatch.setattr(
        type(tiny), "forward", lambda self, ids, *rest: sizes.append(ids.shape[1]) or forward(self, ids, *rest)
    )
    generate_one(tiny, [random_ids(1, 64)], 96, image(4, Sampling(threshold=1.0)))
    assert sizes == [96, 32, 32, 32, 64, 32, 32, 32, 64, 32, 32, 32]


def test_rounds_are_reported_with_their_block(tiny, generate_one):
    seen = []
    config = image(2, Sampling(threshold=1.0))
    generate_one(tiny, [random_ids(1, 30)], 40, config, on_round=lambda _, block, done: seen.append((block, done)))
    assert seen == [(0, 1), (1, 1), (1, 2), (2, 1), (2, 2)]  # 2 masks in the first block: one round's quota of 16


def test_the_global_generator_is_left_alone(tiny, generate_one):
    before = torch.get_rng_state()
    generate_one(tiny, [random_ids(1, 30)], 40, image(4, Sampling(temperature=1.0)), seed=5)
    assert torch.equal(torch.get_rng_state(), before)


# Predictions that are not finite


@pytest.mark.parametrize("after", [1, 2, 3, 6])
def test_overflow_is_an_error_in_the_round_in_which_it_comes(after, tiny, generate_one, monkeypatch):
    """Better no picture than one of noise: in the first round of a block, in later ones, and in later blocks."""
    rounds, head = [], tiny.lm_head.forward

    def overflow(x, low=0, high=None):
        rounds.append(x)
        return head(x, low, high) * (float("inf") if len(rounds) == after else 1)

    monkeypatch.setattr(tiny.lm_head, "forward", overflow)
    with pytest.raises(InputError, match=r"precision: found .* range of torch\.float32, from finite .* overflowed"):
        generate_one(tiny, [random_ids(1, 32)], 64, image(4, Sampling(threshold=1.0)))
    assert len(rounds) == after


def test_overflow_in_float16_says_what_to_choose(tiny, generate_one, monkeypatch):
    monkeypatch.setattr(
        tiny.lm_head, "forward", lambda x, low, high: x[..., :1].expand(*x.shape[:-1], high - low) * float("nan")
    )
    half = copy.deepcopy(tiny).half()
    with pytest.raises(InputError, match=r"range of torch\.float16.*choose bf16, or fp32"):
        generate_one(half, [random_ids(1, 32)], 64, image(4), dtype=torch.float16)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(float("nan"), torch.bfloat16), (float("inf"), torch.bfloat16), (float("nan"), torch.float16)],
)
def test_a_weight_that_is_not_finite_is_named(value, dtype, tiny, generate_one):
    damaged = copy.deepcopy(tiny).to(dtype)
    damaged.layers[1].mlp.experts.down.weight[:, 7, 3] = value
    with pytest.raises(
        CheckpointError, match=r"backbone: layers\.1\.mlp\.experts\.down\.weight.*download the ch"
    ) as error:
        generate_one(damaged, [random_ids(1, 32)], 64, image(4), dtype=dtype)
    assert "bf16" not in str(error.value)


def test_a_weight_that_float16_cannot_hold_is_no_damage(tiny, generate_one):
    large = copy.deepcopy(tiny)
    large.layers[1].mlp.experts.down.weight[:, 7, 3] = 1e6
    with pytest.raises(InputError, match=r"precision: found backbone: layers\.1\..*choose bf16") as error:
        generate_one(large.half(), [random_ids(1, 32)], 64, image(4), dtype=torch.float16)
    assert not isinstance(error.value, CheckpointError)
