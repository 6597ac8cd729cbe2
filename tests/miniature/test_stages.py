"""The stages learn, survive a kill, and compute what the engine computes."""

import math
import random

import numpy as np
import pytest
import torch

from dev.miniature import backbone, decoder, tokenizer, vision
from dev.miniature.backbone import LENGTH
from dev.miniature.examples import SHARES, drill, example
from dev.miniature.packing import FIXED, TARGET, Sequence, Turn, lay_out, rows_of, sequence, visible
from dev.miniature.sizes import BLOCK, PREPROCESSOR
from dev.miniature.stage import Budget, make_optimizer, run, take_step
from dev.miniature.train import STAGES
from dev.miniature.world import GRIDS, render, sample_scene, view
from llada_core.options import Guidance, Sampling
from llada_core.sampling import block_diffusion
from llada_core.sampling.batch import Sample
from llada_core.vision.preprocess import Normalisation, PixelBudgets, prepare

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", STAGES)
def test_loss_falls_on_a_fixed_batch(stage, name):
    made = stage(name)
    optimizer = make_optimizer(made.module.train(), made.schedule.rate)
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


@pytest.mark.parametrize("grid", GRIDS)
def test_training_sees_pictures_as_the_engine_does(grid):
    scene = sample_scene(random.Random(4))
    scene = type(scene)(scene.things, scene.background, grid)
    picture = torch.from_numpy(np.asarray(render(scene)).copy()) / 255
    budgets = PixelBudgets.from_config(PREPROCESSOR)
    model = vision.build().eval()
    codes = vision.codes_of(model, torch.from_numpy(np.asarray(view(scene)).copy())[None])[0]
    for purpose in ("understand", "edit"):
        pixels = Normalisation.from_config(PREPROCESSOR)(prepare(picture, purpose, budgets=budgets))
        assert tuple(pixels.shape[1:]) == (16 * grid[0], 16 * grid[1])
        assert torch.equal(model.encode(pixels), codes)


def test_the_decoder_is_trained_as_the_engine_runs_it():
    model = decoder.build().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    codes = torch.randint(512, (2, 6, 8))
    x, t = torch.randn(2, 16, 1, 24, 32), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        ours, _ = decoder.velocity(model["transformer"], x, t, decoder.features(model["embedder"], codes))
        for i in range(2):
            condition = model["transformer"].condition(model["embedder"](codes[i]), x.shape[-2:])
            engine = model["transformer"].velocity(x[i : i + 1], float(t[i]), condition)
            torch.testing.assert_close(ours[i : i + 1], engine, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def words():
    return tokenizer.vocabulary(tokenizer.build())


@pytest.mark.parametrize("task", SHARES)
def test_a_sequence_ends_as_the_engine_would_end_it(task, words):
    rng = random.Random(task)
    for _ in range(20):
        made = example(rng, task=task)
        codes = [torch.zeros(scene.grid, dtype=torch.int16) for scene in made.scenes]
        seq = sequence(made, codes, words, rng)
        assert seq.turns[-1].end <= len(seq.ids)
        for turn in seq.turns:
            filled = seq.ids[turn.start : turn.end]
            assert all((token >= words.image_offset) == turn.image for token in filled)
            if turn.image:
                assert words.read_header(seq.ids[: turn.start])
                assert len(filled) in {rows * columns for rows, columns in GRIDS}
            else:
                assert filled[-1] in (words.end, words.boi)
        packed = lay_out(seq, words)
        assert len(packed.ids) <= LENGTH
        learnt = [token for token, role in zip(packed.ids, packed.roles, strict=True) if role == TARGET]
        wanted = [token for turn in seq.turns for token in seq.ids[turn.start : turn.end]]
        assert [token for token in learnt if token != words.end] == [token for token in wanted if token != words.end]


def test_places_pictures_and_weights_of_a_row(words):
    """Two pictures shown, one answer: what the helping head is asked, and what the answer weighs."""
    rng = random.Random(3)
    made = drill(rng, lambda: sample_scene(rng))
    while made.kind != "which":
        made = drill(rng, lambda: sample_scene(rng))
    codes = [torch.zeros(scene.grid, dtype=torch.int16) for scene in made.scenes]
    seq = sequence(made, codes, words, rng)
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
    batch = rows_of([packed], 1, LENGTH, words.end)
    assert batch["weights"].dtype == torch.float32
    assert batch["weights"].sum() == pytest.approx(LENGTH - len(heavy) + 16)


@pytest.mark.parametrize("pad", [0, 5])
def test_packed_training_computes_what_the_runner_computes(words, pad):
    """Each copy of a block, all masked, against the engine filling that block from the same prefix."""
    model = backbone.build(backbone.config(words.vocab_size, words.image_offset)).eval()
    rng = random.Random(0)
    ids = [rng.randrange(words.vocab_size) for _ in range(150)]
    seq = Sequence(ids, [Turn(40, 71, False), Turn(71, 150, True)], pad)
    packed = lay_out(seq, words)
    batch = rows_of([lay_out(Sequence(ids[:50], [Turn(20, 50, False)]), words), packed], 1, LENGTH, words.end)
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
