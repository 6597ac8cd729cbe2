"""The stages learn, survive a kill, and compute what the engine computes."""

import math
import random
import shutil
from dataclasses import replace

import pytest
import torch

from dev.miniature import decoder, pieces, pools, tokenizer, vision
from dev.miniature.examples import Example
from dev.miniature.muon import Muon, orthogonal
from dev.miniature.pictures import in_processes, picture_pool
from dev.miniature.stage import Budget, make_optimizer, run, take_step
from dev.miniature.train import STAGES
from dev.miniature.worlds import WORLDS
from llada_core.vision.preprocess import Normalisation, PixelBudgets, prepare

CPU = torch.device("cpu")


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
