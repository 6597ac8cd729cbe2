"""The benchmark judges what it says it judges."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import quality, quality_signs, quality_table
from benchmarks.quality import Quality, examples, judge, measurements
from benchmarks.rounded import opened, rounded
from benchmarks.tally import Tally
from dev.miniature.checker import Report, look
from dev.miniature.signs import world as signs
from dev.miniature.signs.checker import look as signs_look
from dev.miniature.signs.drawing import painted
from dev.miniature.world import Scene, Thing, held_out, render, sample_scene
from llada_core.engine import LLaDAUni
from llada_core.image_tokens import ImageTokens
from llada_core.sampling.pipeline import Usage

SCENE = Scene((Thing("circle", "red", "large", "left"), Thing("star", "blue", "small", "right")), "yellow")


def judged(scene: Scene, report: Report) -> dict[str, float]:
    tally = Tally()
    judge(tally, scene, report)
    return tally.figures()


def test_true_pictures_are_all_right():
    rng = random.Random(0)
    for _ in range(20):
        scene = sample_scene(rng)
        assert set(judged(scene, look(np.asarray(render(scene)))).values()) == {100.0}


def test_what_is_wrong_is_charged_to_its_attribute():
    circle, star = SCENE.things
    found = judged(SCENE, Report((circle, replace(star, colour="green")), "yellow"))
    assert (found["colour"], found["shape"], found["size"], found["place"]) == (50, 100, 100, 100)
    assert (found["all right"], found["all right, 2"], found["count"], found["background"]) == (0, 0, 100, 100)
    found = judged(SCENE, Report((circle,), "white"))
    assert (found["shape"], found["count"], found["background"]) == (50, 0, 0)
    found = judged(SCENE, Report((circle, star, replace(star, place="above")), "yellow"))
    assert (found["shape"], found["count"], found["all right"]) == (100, 0, 0)


def test_prompts_are_held_out_and_always_the_same():
    made = examples("draw", 30, 0)
    assert made == examples("draw", 30, 0)
    assert all(held_out(one.frames[-1][1]) for one in made)


def test_speed_is_rounds_a_generation_and_tokens_a_second():
    tally = Tally()
    tally.usages += [Usage(64, 16, 1.0), Usage(64, 8, 1.0)]
    assert tally.figures() == {"rounds": 12.0, "tokens/s": 64.0}


def test_an_interval_is_wide_for_few_prompts_and_holds_the_share():
    few, many = Tally(), Tally()
    for i in range(400):
        many.add("right", i % 4 != 0)
        if i < 20:
            few.add("right", i % 4 != 0)
    (low, high), (least, most) = many.interval("right"), few.interval("right")
    assert least < low < 75 < high < most
    assert low > 70
    assert high < 80
    assert many.interval("right") == (low, high)
    many.add("always", True)
    assert many.interval("always") == (100, 100)


def test_fewer_bits_are_further_from_the_weights():
    weight = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    errors = [float((rounded(weight, bits) - weight).norm() / weight.norm()) for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.2
    assert errors[-1] < 0.01
    assert len(rounded(weight, 2)[0, :64].unique()) <= 4


def test_a_checkpoint_opens_with_its_backbone_in_two_bits(short_checkpoint):
    model = opened(short_checkpoint, "cpu", "2 bits")
    module = model.manager.place("backbone", model.components["backbone"], lambda dtype: 0).module
    assert len(module.layers[1].mlp.experts.down.weight[0, 0, :64].unique()) <= 4
    assert len(module.layers[0].attention.dense.weight[0, :64].unique()) <= 4
    assert len(module.lm_head.weight[0].unique()) > 20
    assert model.generate("a star", 384, 512).usage.rounds > 0


ROWS = ["redraw", "draw, SPRINT", "questions, plain", "edit, plain", "stories, plain"]
MORE = ["draw, by hand", "plans, thinking", "edit, in a mask", "questions, other words"]


@pytest.mark.parametrize("name", ROWS + MORE)
def test_every_measurement_runs(world, short_checkpoint, name):
    model = LLaDAUni(short_checkpoint)
    if world.name == "signs":
        rows = quality_signs.measurements(quality_signs.Quality(model, 2, 1, side=2))
    elif name in MORE:
        return
    else:
        rows = measurements(Quality(model, 1, 0))
    tally = rows[name]()
    figures = tally.figures()
    assert figures
    assert ("rounds" in figures) == (name != "redraw")
    assert all(0 <= tally.interval(key)[0] <= value <= 100 for key, value in figures.items() if key in tally.right)


def test_the_harder_world_is_judged_place_by_place():
    scene = signs.Scene(
        (signs.Thing("star", "red", place="left"), signs.Thing("heart", "blue", place="right")),
        sign=signs.Sign("CAT", "black", "bottom"),
    )
    tally = Tally()
    quality_signs.judge(tally, scene, signs_look(painted(scene)))
    assert set(tally.figures().values()) == {100.0}
    tally = Tally()
    wrong = replace(scene.with_things((scene.things[0],)), sign=signs.Sign("CAR", "black", "bottom"))
    quality_signs.judge(tally, scene, signs_look(painted(wrong)))
    found = tally.figures()
    assert (found["shape"], found["words"], found["count"], found["all right"]) == (50, 0, 0, 0)
    assert found["background"] == 100


def test_a_mask_is_the_place_that_an_edit_is_about():
    before = signs.Scene((signs.Thing("star", "red", place="left"), signs.Thing("heart", "blue", place="right")))
    after = before.with_things((replace(before.things[0], colour="green"), before.things[1]))
    mask = quality_signs.place_mask(before, after)
    changed = (painted(before) != painted(after)).any(-1)
    assert mask.shape == changed.shape
    assert not (torch.from_numpy(changed) & (mask == 0)).any()
    assert mask.sum() == 3 * 4 * 32**2
    with pytest.raises(ValueError, match="mask"):
        quality_signs.place_mask(before, before)


def test_prompts_of_the_harder_world_are_of_their_split():
    q = quality_signs.Quality(None, 12, 0)
    assert q.examples("draw") == q.examples("draw")
    assert all(signs.held_out(one.scenes[-1]) for one in q.examples("draw"))
    assert all(signs.held_apart(one.scenes[-1]) for one in q.examples("draw", "combination"))
    assert [len(part) for part in quality_signs.Quality(None, 12, 0, side=5).parts(q.examples("draw"))] == [5, 5, 2]


def test_shares_of_the_prompts_are_all_of_them_and_each_once():
    every = quality_signs.Quality(None, 10, 7)
    shares = [quality_signs.Quality(None, 10, 7, share=(i, 3)) for i in range(3)]
    for task in ("draw", "story"):
        assert sorted(map(repr, (one for q in shares for one in q.examples(task)))) == sorted(
            map(repr, every.examples(task))
        )
    assert [q.examples("draw")[0] for q in shares] == every.examples("draw")[:3]
    assert [q.normal for q in shares] == [3, 2, 2]  # of the first seven, which each share begins with
    assert len(shares[1].shared(range(5))) == 2


def test_a_share_is_refused_where_there_are_none(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["quality", "nowhere", "--share", "1/4"])
    with pytest.raises(SystemExit):
        quality.main()
    assert "--share: found with --world shapes, expected signs" in capsys.readouterr().err


def test_what_shares_judged_makes_one_row(tmp_path):
    tallies = [Tally(), Tally()]
    for tally, rights in zip(tallies, ((True, False), (True,)), strict=True):
        for right in rights:
            tally.add("right", right)
            tally.usages.append(Usage(10, 4, 1.0))
        tally.add("words", False)
        tally.seconds = 2.0
    files = [tmp_path / f"{i}.json" for i in range(2)]
    for file, tally in zip(files, tallies, strict=True):
        file.write_text(json.dumps({"edit, plain": tally.raw()}))
    ((name, whole),) = quality_table.merged(files)
    assert whole.right == {"right": [1, 0, 1], "words": [0, 0]}
    assert whole.figures()["rounds"] == 4
    assert whole.figures()["tokens/s"] == pytest.approx(30 / 4)
    line = quality_table.row(name, whole)
    assert line.startswith("| edit, plain | 66.7 | 4.0 | 7.5 | ")
    assert "in 95 %, of 3; words 0" in line
    assert quality_table.table("Said.", [line]).splitlines()[0::4] == ["Said.", line]


def test_the_same_tokens_are_decoded_once_and_judged_alike():
    scenes = [signs.Scene((signs.Thing("star", colour),)) for colour in ("red", "blue")]
    decoded = []

    class Model:
        """Draws a scene by its only code."""

        def decode(self, tokens, decoding):
            (grid,) = tokens.grids
            decoded.append((int(grid[0, 0]), decoding.turbo))
            return [torch.from_numpy(painted(scenes[int(grid[0, 0])]).copy()) / 255]

    q = quality_signs.Quality(Model(), 0, 0)
    tokens = [ImageTokens((torch.full((16, 16), code),), 2) for code in (0, 1)]
    found = [q.report(tokens[code], turbo) for code, turbo in ((0, True), (1, True), (0, True), (0, False), (1, True))]
    assert [one.scene for one in found] == [scenes[0], scenes[1], scenes[0], scenes[0], scenes[1]]
    assert all(one.clean for one in found)
    assert decoded == [(0, True), (1, True), (0, False)]
