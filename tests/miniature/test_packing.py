"""Examples become rows, and rows train what the engine computes."""

import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from dev.miniature import backbone, packing, tokenizer
from dev.miniature.examples import SHARES as TASKS
from dev.miniature.examples import Example
from dev.miniature.packing import (
    FIXED,
    TARGET,
    Manner,
    Packed,
    Sequence,
    Turn,
    lay_out,
    length_of,
    rows_of,
    sequence,
    sparsely_visible,
    visible,
)
from dev.miniature.sizes import BLOCK
from llada_core.backbone import attention_kernels, experts
from llada_core.options import Guidance, Sampling
from llada_core.quantization import grouped
from llada_core.sampling import block_diffusion
from llada_core.sampling.batch import Sample


@pytest.fixture(scope="module")
def words(world):
    return tokenizer.vocabulary(tokenizer.build(world), world.sizes)


def manner(world) -> Manner:
    return Manner(world.grids[0], world.sizes.object_weight, world.sizes.length)


@pytest.mark.parametrize("task", TASKS)
def test_a_sequence_ends_as_the_engine_would_end_it(world, task, words):
    rng = random.Random(task)
    for _ in range(20):
        made = world.example(rng, task)
        codes = [torch.zeros(scene.grid, dtype=torch.int16) for scene in made.scenes]
        seq = sequence(made, codes, words, rng, manner(world))
        assert seq.turns[-1].end <= len(seq.ids)
        for turn in seq.turns:
            filled = seq.ids[turn.start : turn.end]
            assert all((token >= words.image_offset) == turn.image for token in filled)
            if turn.image:
                assert words.read_header(seq.ids[: turn.start])
                assert len(filled) in {rows * columns for rows, columns in world.grids}
            else:
                assert filled[-1] in (words.end, words.boi)
        packed = lay_out(seq, words)
        assert len(packed.ids) <= world.sizes.length
        learnt = [token for token, role in zip(packed.ids, packed.roles, strict=True) if role == TARGET]
        wanted = [token for turn in seq.turns for token in seq.ids[turn.start : turn.end]]
        assert [token for token in learnt if token != words.end] == [token for token in wanted if token != words.end]


def test_places_pictures_and_weights_of_a_row(world, words):
    """Two pictures shown, one answer: what the helping head is asked, and what the answer weighs."""
    rng, length = random.Random(3), world.sizes.length

    def drilled():
        return world.drill(rng, lambda: world.sample(rng, world.grids[0]))

    made = drilled()
    while made.kind != "which":
        made = drilled()
    codes = [torch.zeros(scene.grid, dtype=torch.int16) for scene in made.scenes]
    seq = sequence(made, codes, words, rng, manner(world))
    packed = lay_out(seq, words)
    shown = [codes[0].numel(), codes[1].numel()]
    seen = sorted({(p, q) for p, q in zip(packed.pictures, packed.places, strict=True) if p >= 0})
    assert seen == [(picture, place) for picture in (0, 1) for place in range(shown[picture])]
    for token, place in zip(packed.ids, packed.places, strict=True):
        assert (token >= words.image_offset) == (place >= 0)
    (turn,) = seq.turns
    assert turn.weight * (turn.end - turn.start) == pytest.approx(16)
    heavy = [p for p, weight in zip(packed.positions, packed.weights, strict=True) if weight > 1]
    assert heavy == list(range(turn.start, turn.end))
    batch = rows_of([packed], 1, length, words.end)
    assert batch["weights"].dtype == torch.float32
    assert batch["weights"].sum() == pytest.approx(length - len(heavy) + 16)


def test_what_is_not_the_ground_weighs_more(words):
    rows, columns = 4, 16
    codes = torch.zeros(rows, columns, dtype=torch.int16)
    codes[1, 2:4] = torch.tensor([7, 8], dtype=torch.int16)
    rng = random.Random(0)
    made = Example("draw", "", "a star", (), (("", None),))
    seq = sequence(made, [codes], words, rng, Manner((rows, columns), 3.0))
    (turn,) = seq.turns
    assert [at for at, weight in enumerate(turn.weights) if weight == 3] == [columns + 2, columns + 3]
    packed = lay_out(seq, words)
    assert sum(weight == 3 for weight in packed.weights) == 2


def test_what_an_edit_changes_weighs_twice_what_it_keeps(words):
    """The ground stays at 1, also where it is changed for another."""
    before = torch.zeros(4, 16, dtype=torch.int16)
    before[1, 2:5] = torch.tensor([7, 8, 9], dtype=torch.int16)
    after = before.clone()
    after[after == 0] = 3
    after[1, 3], after[1, 4], after[2, 2] = 5, 3, 6  # another, none, and a new one
    made = Example("edit", "", "a star", (None,), (("", None),))
    (turn,) = sequence(made, [before, after], words, random.Random(0), Manner((4, 16), 3.0)).turns
    found = {at: weight for at, weight in enumerate(turn.weights) if weight > 1}
    assert found == {16 + 2: 3.0, 16 + 3: 6.0, 16 + 4: 6.0, 32 + 2: 6.0}


def test_a_plan_weighs_as_much_as_objects_do_and_its_reasoning_twice(words):
    codes, rng = [torch.zeros(4, 16, dtype=torch.int16)], random.Random(0)
    for text, reasoning in (("a star it is", ""), ("one and one. is two. white", "one and one. is two.")):
        made = Example("think", "sum", "a star", (), ((text, None),))
        drawn = [sequence(made, codes, words, rng, Manner((4, 16), 3.0)).turns for _ in range(40)]
        plans = [turn for (turn,) in drawn if not turn.image]
        assert 15 < len(plans) < 40
        assert {turn.weight for turn in plans} == {3.0}
        twice = len(words.encode(reasoning))
        assert {turn.weights for turn in plans} == {(6.0,) * twice + (3.0,) * (plans[0].end - plans[0].start - twice)}


def test_turns_are_left_out_where_a_row_has_no_room(words):
    ids = list(range(300))
    turns = [Turn(40, 100, False), Turn(100, 200, True), Turn(210, 300, True)]
    assert length_of(Sequence(ids, turns)) > 450
    made = Example("story", "", "", (), ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_sequence", lambda *_: Sequence(ids, turns))
        seq = sequence(made, [], words, random.Random(1), Manner((4, 4), length=450))
    assert 1 <= len(seq.turns) < 3
    assert len(lay_out(seq, words).ids) <= 450


def test_skipping_empty_squares_computes_the_same(words):
    """What a GPU runs, `sparsely_visible`, against the whole mask, by torch's plain form of it."""
    rng = random.Random(2)
    one = Sequence([rng.randrange(words.vocab_size) for _ in range(90)], [Turn(30, 90, True)], 5)
    batch = rows_of([lay_out(one, words)] * 3, 2, 256, words.end)
    q, k, v = torch.randn(2, 4, 256, 32), torch.randn(2, 2, 256, 32), torch.randn(2, 2, 256, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_squares", lambda: create_block_mask)
        sparse = sparsely_visible(batch)(q, k, v, None)
    bias = attention_kernels.bias(visible(batch), 256, 2, q.dtype)
    torch.testing.assert_close(sparse, attention_kernels.sdpa(q, k, v, bias), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_compiled_layers_count_their_own_experts(world, stage, monkeypatch):
    """What evens the experts out; compiled layers share code, and once each counted for another."""
    for module in (grouped, experts):
        monkeypatch.setattr(module, "can_group", lambda bank, dtype: True)
    monkeypatch.setattr(packing, "_squares", lambda: create_block_mask)
    made = stage("backbone")
    batch = made.batch(1)

    def loads() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            made.loss(batch, torch.Generator().manual_seed(0))
        return [router.load.clone() for router in made.routers]

    before = loads()
    made.compile(backend="aot_eager")
    for _ in range(2):
        for own, plain in zip(loads(), before, strict=True):
            assert own.sum() == plain.sum() == batch["ids"].numel() * made.routers[0].config.num_experts_per_tok
            assert (own - plain).abs().sum() <= 0.02 * plain.sum()  # rounding moves a few
    assert any(not torch.equal(one, before[0]) for one in before[1:])


def test_biases_bring_idle_experts_back(stage):
    made = stage("backbone")
    router = made.routers[0]
    router.load.copy_(torch.arange(len(router.load)))
    made.after_step(1)
    assert router.expert_bias[0] > 0 > router.expert_bias[-1]


@pytest.mark.parametrize("pad", [0, 5])
def test_packed_training_computes_what_the_runner_computes(world, words, pad):
    """Each copy of a block, all masked, against the engine filling that block from the same prefix."""
    model = backbone.build(backbone.config(world.sizes, words.vocab_size, words.image_offset)).eval()
    rng = random.Random(0)
    ids = [rng.randrange(words.vocab_size) for _ in range(150)]
    seq = Sequence(ids, [Turn(40, 71, False), Turn(71, 150, True)], pad)
    packed = lay_out(seq, words)
    batch = rows_of([lay_out(Sequence(ids[:50], [Turn(20, 50, False)]), words), packed], 1, 768, words.end)
    masked = torch.where(batch["roles"] != FIXED, words.mask, batch["ids"])
    with torch.no_grad():
        hidden = backbone.forward(model, batch, masked)[0]
    compared = 0
    for group in range(1, int(batch["groups"][0][batch["owners"][0] == 1].max()) + 1):
        here = (batch["owners"][0] == 1) & (batch["groups"][0] == group)
        start = int(batch["blocks"][0][here][0]) * BLOCK
        first = int((batch["roles"][0][here] != FIXED).nonzero()[0]) + int(batch["positions"][0][here][0])
        prompts = [ids[:first]] if pad == 0 else [[words.end] * pad + ids[:first], ids[:first]]
        sampling, guidance = Sampling(block_length=BLOCK), Guidance()
        config = block_diffusion.GenerationConfig(1, 0, words.vocab_size, sampling=sampling, guidance=guidance)
        runner, canvas = block_diffusion.prepare(model, [Sample(prompts, [words.mask] * BLOCK)], config, words.mask)
        with torch.no_grad():
            engine = runner.block(canvas.rows, start)[-1]
        torch.testing.assert_close(hidden[here], engine, rtol=1e-4, atol=1e-4)
        compared += 1
    assert compared == 5  # two blocks of the text, three of the image


def test_nobody_sees_another_sequence_or_another_copy(words):
    seq = Sequence(list(range(100)), [Turn(40, 100, False)])
    batch = rows_of([lay_out(seq, words)] * 2, 1, 512, words.end)
    sees = visible(batch)[0, 0]
    owners, groups = batch["owners"][0], batch["groups"][0]
    assert not sees[owners == 0][:, owners == 1].any()
    assert not sees[(owners == 0) & (groups == 1)][:, (owners == 0) & (groups == 2)].any()
    assert not sees[(owners == 0) & (groups == 0)][:, groups > 0].any()
    assert sees.diagonal().all()


def test_rows_are_filled_with_what_fits_and_nothing_waits_for_ever(words):
    rng = random.Random(0)

    def one_of(length: int) -> Packed:
        return lay_out(Sequence(list(range(length)), [Turn(length - 20, length, False)]), words)

    def packed():
        while True:
            yield one_of(rng.choice((60, 100, 200)))

    batch = rows_of(packed(), 12, 256, words.end)
    assert (batch["owners"] >= 0).float().mean() > 0.9
    for owner in range(int(batch["owners"].max()) + 1):
        assert len((batch["owners"] == owner).any(1).nonzero()) == 1
    with pytest.raises(ValueError, match="positions of a row"):
        rows_of([one_of(300)], 1, 256, words.end)
