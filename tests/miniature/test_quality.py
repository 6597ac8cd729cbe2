"""The benchmark judges what it says it judges."""

import random
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.quality import Quality, Tally, examples, judge, measurements
from dev.miniature.checker import Report, look
from dev.miniature.world import Scene, Thing, held_out, render, sample_scene
from llada_core.engine import LLaDAUni
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


@pytest.mark.parametrize("name", ["redraw", "draw, SPRINT", "questions, plain", "edit, plain", "stories, plain"])
def test_every_measurement_runs(short_checkpoint, name):
    figures = measurements(Quality(LLaDAUni(short_checkpoint), 1, 0))[name]().figures()
    assert figures
    assert ("rounds" in figures) == (name != "redraw")
