"""The stages learn, survive a kill, and compute what the engine computes."""

import math
import random
import shutil
from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from dev.miniature import backbone, decoder, packing, pieces, pools, tokenizer, vision
from dev.miniature.examples import SHARES as TASKS
from dev.miniature.examples import Example
from dev.miniature.muon import Muon, orthogonal
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
from dev.miniature.pictures import in_processes, picture_pool
from dev.miniature.sizes import BLOCK
from dev.miniature.stage import Budget, make_optimizer, run, take_step
from dev.miniature.train import STAGES
from dev.miniature.worlds import WORLDS
from llada_core.backbone import attention_kernels, experts
from llada_core.options import Guidance, Sampling
from llada_core.quantization import grouped
from llada_core.sampling import block_diffusion
from llada_core.sampling.batch import Sample
from llada_core.vision.preprocess import Normalisation, PixelBudgets, prepare

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Several add the gradients of an embedding up in an order of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", STAGES)
def test_loss_falls_on_a_fixed_batch(stage, name):
    made = stage(name)
    optimizer = make_optimizer(made)
    batch = made.batch(1)
    losses = [float(take_step(made, optimizer, batch, 7, CPU)[0]) for _ in range(6)]
    assert all(map(math.isfinite, losses))
    assert min(losses[3:]) < losses[0]


@pytest.mark.parametrize("name", ["vision", "backbone"])
def test_a_killed_stage_goes_on_as_if_nothing_had_been(stage, name, tmp_path, monkeypatch):
    monkeypatch.setattr("dev.miniature.stage.SAVE_EVERY", 0.0)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    through = run(stage(name), whole, Budget(3), CPU)
    killed = stage(name)
    original = killed.batch
    killed.batch = lambda step: original(step) if step < 2 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        run(killed, broken, Budget(3), CPU)
    assert torch.load(broken / f"{name}.pt", weights_only=True)["step"] == 2
    resumed = run(stage(name), broken, Budget(3), CPU)
    assert resumed["step"] == through["step"] == 3
    for key, value in resumed["model"].items():
        assert torch.equal(value, through["model"][key]), key


def test_what_is_done_is_not_done_again(stage, short_run):
    assert run(stage("vae"), short_run, Budget(50), CPU)["step"] == 2


def test_a_stage_goes_on_with_a_larger_budget_when_it_is_told_to(stage, short_run, tmp_path):
    shutil.copy(short_run / "vae.pt", tmp_path)
    state = run(stage("vae"), tmp_path, Budget(3), CPU, more=True)
    assert state["step"] == 3


def test_a_run_that_was_carried_goes_on_where_it_was(stage, short_run, tmp_path):
    written = pieces.pack(short_run, tmp_path / "pieces", size=1_000_000)
    assert len(written) > 3
    assert all(path.stat().st_size <= 1_000_000 for path in written)
    names = pieces.unpack(tmp_path / "pieces", tmp_path / "run")
    assert set(names) >= {f"{name}.pt" for name in STAGES} | {"latents.json"}
    kept = torch.load(short_run / "vision.pt", weights_only=True)["model"]
    carried = torch.load(tmp_path / "run" / "vision.pt", weights_only=True)
    assert carried["step"] == 2
    assert all(torch.allclose(value.float(), kept[name].float(), rtol=1e-2) for name, value in carried["model"].items())
    assert run(stage("vision"), tmp_path / "run", Budget(4), CPU, more=True)["step"] == 4


@pytest.mark.parametrize("number", range(4))
def test_training_sees_pictures_as_the_engine_does(world, number):
    grid = world.grids[number % len(world.grids)]
    scene = world.sample(random.Random(4), grid)
    picture = torch.from_numpy(world.painted(scene).copy()) / 255
    budgets = PixelBudgets.from_config(world.sizes.preprocessor)
    model = vision.build(world.sizes).eval()
    codes = vision.codes_of(model, torch.from_numpy(world.seen(scene).copy())[None])[0]
    # A size that is only drawn is halved where the caller says so.
    given = [("understand", 0), ("edit", 0)] if grid in world.shown else [("understand", 16**2 * grid[0] * grid[1])]
    for purpose, area in given:
        pixels = prepare(picture, purpose, budgets=budgets, pixels=area)
        pixels = Normalisation.from_config(world.sizes.preprocessor)(pixels)
        assert tuple(pixels.shape[1:]) == (16 * grid[0], 16 * grid[1])
        assert torch.equal(model.encode(pixels), codes)


def test_pools_are_drawn_alike_by_one_process_and_by_many(world, tmp_path):
    one = picture_pool(world, tmp_path / "one", 400 // len(world.grids), 0, False, CPU)
    many = picture_pool(world, tmp_path / "many", 400 // len(world.grids), 3, False, CPU)
    again = picture_pool(world, tmp_path / "many", 400 // len(world.grids), 3, False, CPU)
    for grid, first, second, third in zip(world.grids, one, many, again, strict=True):
        assert first["seen"].shape[1:] == (16 * grid[0], 16 * grid[1], 3)
        for name, value in first.items():
            assert torch.equal(value, second[name])
            assert torch.equal(value, third[name])


def test_a_look_has_the_code_that_is_nearest_to_its_mean(world, short_run, tmp_path, capsys):
    """With the mean of each look laid on a code of its own choice, scenes get those codes, and no picture is drawn."""
    state = torch.load(short_run / "vision.pt", weights_only=True)
    codebook = state["model"]["model.vqmodel.quantize.embedding.weight"]
    torch.nn.init.orthogonal_(codebook, generator=torch.Generator().manual_seed(0))
    chosen = torch.arange(len(state["model"]["looks"])) * 7 % codebook.shape[1]
    state["model"]["looks"] = 3 * codebook[chosen]
    torch.save(state, tmp_path / "vision.pt")
    table = pools.code_table(world, tmp_path)
    assert (torch.nn.functional.cosine_similarity(codebook[table], codebook[chosen]) > 0.999).all()
    assert "as the vision tower has them" in capsys.readouterr().out
    scene = world.sample(random.Random(2), world.grids[1])
    told = world.targets(scene)
    codes = pools.codes_by_look(world, torch.arange(len(table)), scene)
    assert tuple(codes.shape) == scene.grid
    looks = zip(told["colour"], told["kind"], told["quarter"], strict=True)
    names = {int(code): look for code, look in zip(codes.flatten(), looks, strict=True)}
    assert len(names) == len(set(names.values())) > 1  # one code a look, and one look a code


def test_examples_are_made_anew_at_every_step_and_alike_for_one_step(stage):
    made = stage("backbone")
    first, again, other = (made.batch(step) for step in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["ids"], other["ids"])


def test_a_kept_tokenizer_does_not_change_with_the_texts():
    """Weights read what they learnt with, whatever is asked of the world today."""
    signs = WORLDS["signs"]()
    changed = replace(signs, example=lambda rng, task: Example("draw", "", "other words", (), (("", None),)))
    kept = tokenizer.build(changed)
    assert kept.to_str() == tokenizer.build(signs).to_str()
    assert tokenizer.learn(changed).to_str() != kept.to_str()
    assert kept.get_vocab_size(with_added_tokens=False) == 256 + signs.sizes.merges
    for text in ("HELLO", "4711"):
        assert len(kept.encode(text).ids) == len(text)  # written one by one
    asked = 'Swap the red heart and the \u661f, then write "AB".'
    assert kept.decode(kept.encode(asked).ids) == asked


def test_a_process_that_fails_is_told():
    with pytest.raises(RuntimeError, match="ended early"):
        in_processes(lambda i: 1 // (i - 250), 300, 2)


def test_the_codebook_has_a_code_for_each_look(stage):
    made = stage("vision")
    made.free = 2
    optimizer = make_optimizer(made)
    for step in range(3):
        take_step(made, optimizer, made.batch(step), step, CPU)
    codes = made.module.model.vqmodel.quantize.embedding.weight
    known = made.module.looks[made.module.looks.abs().sum(-1) > 0]
    near = torch.nn.functional.normalize(known, dim=-1) @ torch.nn.functional.normalize(codes, dim=-1).T
    assert (near.amax(-1) > 0.97).float().mean() > 0.9


def test_the_decoder_is_trained_as_the_engine_runs_it(world):
    model = decoder.build(world).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    rows, columns = world.grids[1]
    codes = torch.randint(512, (2, rows, columns))
    x, t = torch.randn(2, 16, 1, 4 * rows, 4 * columns), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        ours, _ = decoder.velocity(model["transformer"], x, t, model["embedder"](codes))
        for i in range(2):
            condition = model["transformer"].condition(model["embedder"](codes[i]), x.shape[-2:])
            engine = model["transformer"].velocity(x[i : i + 1], float(t[i]), condition)
            torch.testing.assert_close(ours[i : i + 1], engine, rtol=1e-4, atol=1e-5)


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


def test_a_step_of_muon_is_orthogonal_and_as_large_as_one_of_adamw():
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 40, 24), (2, 24, 40)):
        found = orthogonal(torch.randn(shape, generator=generator))
        values = torch.linalg.svdvals(found)
        assert found.shape == shape
        assert values.min() > 0.5
        assert values.max() < 1.3
    bank, matrix = (torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((3, 40, 24), (40, 24)))
    for p in (bank, matrix):
        p.grad = torch.randn(p.shape, generator=generator)
    bank.grad[1] = matrix.grad
    before = bank.detach().clone(), matrix.detach().clone()
    Muon([bank, matrix], lr=0.01, weight_decay=0.0).step()
    moved = bank.detach() - before[0], matrix.detach() - before[1]
    torch.testing.assert_close(moved[0][1], moved[1], rtol=1e-3, atol=1e-6)
    assert 0.001 < moved[1].square().mean().sqrt() < 0.003
    assert (moved[1] * matrix.grad).sum() < 0


def test_several_optimizers_go_on_as_one(stage):
    made = stage("backbone")
    inner = made.matrices()
    names = {id(p): name for name, p in made.module.named_parameters()}
    assert all(p.ndim >= 2 and ".layers." in names[id(p)] for p in inner)
    assert not any(names[id(p)].endswith("mlp.gate.weight") for p in inner)
    optimizer = make_optimizer(made)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == sum(p.requires_grad for p in made.module.parameters())
    take_step(made, optimizer, made.batch(0), 0, CPU)
    other = make_optimizer(made)
    other.load_state_dict(optimizer.state_dict())
    kept, again = (one.parts[1].state[inner[0]]["momentum"] for one in (optimizer, other))
    assert torch.equal(kept, again)
    assert kept.abs().sum() > 0


def test_features_are_judged_by_the_look_that_is_nearest(stage):
    made = stage("vision")
    generator = torch.Generator().manual_seed(0)
    known = torch.nn.functional.normalize(torch.randn(made.module.looks.shape, generator=generator), dim=-1)
    made.module.looks.copy_(known)
    looks, inked = torch.arange(40), torch.arange(40) < 30
    right, found = made._told_apart(known[:40], looks, inked, generator)
    wrong, lost = made._told_apart(known[1:41], looks, inked, generator)
    assert (float(found), float(lost)) == (1, 0)
    assert right < 0.01 < wrong
    made.module.looks[5] = 0  # never seen: no feature is near it
    assert made._told_apart(known[:40], looks, inked, generator)[1] == pytest.approx(29 / 30)
