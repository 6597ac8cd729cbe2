"""The drawn world: one picture a scene, a split without overlap, texts that read back, a checker that sees."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import ImageFilter

from dev.miniature.checker import changed_places, look, preserved
from dev.miniature.examples import DRILL, EDITS, PAIRED, SHARES, drill, edit, example
from dev.miniature.sizes import SHAPES
from dev.miniature.texts import NUMBERS, QUESTIONS, caption, description, plan, question, read_scene, same_answer
from dev.miniature.tokenizer import SPECIAL, build, vocabulary
from dev.miniature.world import GRIDS, Scene, Thing, held_out, render, sample_scene, view
from dev.miniature.worlds import shapes


def scenes(count: int, split: str | None = None) -> list[Scene]:
    rng = random.Random(3)
    return [sample_scene(rng, split=split) for _ in range(count)]


def test_a_seed_gives_the_same_scenes_and_pictures():
    assert scenes(20) == scenes(20)
    for one, other in zip(scenes(5), scenes(5), strict=True):
        assert np.array_equal(np.asarray(render(one)), np.asarray(render(other)))


@pytest.mark.parametrize("grid", GRIDS)
def test_pictures_have_32_pixels_a_token_and_views_16(grid):
    scene = replace(scenes(1)[0], grid=grid)
    assert render(scene).size == (32 * grid[1], 32 * grid[0])
    assert view(scene).size == (16 * grid[1], 16 * grid[0])


def test_training_and_held_out_scenes_are_disjoint_and_one_in_ten_is_held_out():
    def content(split):
        return {(scene.things, scene.background) for scene in scenes(2000, split)}

    assert not content("train") & content("held-out")
    assert 0.07 < np.mean([held_out(scene) for scene in scenes(3000)]) < 0.13


@pytest.mark.parametrize("task", SHARES)
def test_training_examples_show_no_held_out_scene_and_held_out_ones_end_in_one(task):
    rng = random.Random(5)
    for _ in range(60):
        assert not any(map(held_out, example(rng, "train", task).scenes))
        assert held_out(example(rng, "held-out", task).scenes[-1])


def blurred(scene: Scene, seed: int) -> np.ndarray:
    """The picture as a decoder that is a little off would give it: float, soft edges, some noise."""
    soft = np.asarray(render(scene).filter(ImageFilter.GaussianBlur(1.2)), dtype=np.float64)
    return (soft + np.random.default_rng(seed).normal(0, 6, soft.shape)).clip(0, 255) / 255


def test_the_checker_is_right_on_true_and_on_blurred_drawings():
    drawn = scenes(200)
    assert sum(look(np.asarray(render(scene))).shows(scene) for scene in drawn) >= 198
    assert sum(look(blurred(scene, i)).shows(scene) for i, scene in enumerate(drawn[:60])) >= 59


def test_the_checker_sees_what_is_wrong():
    thing = Thing("circle", "red", "large", "left")
    scene = Scene((thing, Thing("star", "blue", "small", "right")), "yellow")
    for wrong in (
        replace(scene, background="white"),
        scene.with_things((thing,)),
        *(
            scene.with_things((replace(thing, **change), scene.things[1]))
            for change in ({"colour": "orange"}, {"size": "small"}, {"shape": "square"}, {"place": "above"})
        ),
    ):
        assert not look(np.asarray(render(wrong))).shows(scene)


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_changes_something_and_the_rest_is_told_apart(kind):
    rng = random.Random(kind)
    made = next(filter(None, (edit(sample_scene(rng), rng, kind) for _ in range(50))))
    before, after = made.references[0], made.frames[-1][1]
    changed = changed_places(before, after)
    assert changed
    assert after.grid == before.grid
    assert preserved(before, look(np.asarray(render(after))), changed)
    assert not preserved(before, look(np.asarray(render(after))), set())


def test_plans_and_descriptions_say_everything():
    for scene in scenes(200):
        for text in (plan(scene), description(scene)):
            assert read_scene(text) == (scene.things, scene.background)
        assert same_answer(description(scene), description(scene))
        if len(scene.things) > 1:
            assert not same_answer(description(scene.with_things(scene.things[1:])), description(scene))


@pytest.mark.parametrize("kind", QUESTIONS)
def test_every_kind_of_question_has_an_answer(kind):
    rng = random.Random(1)
    asked = [question(scene, rng, kind) for scene in scenes(30)]
    assert any(asked)
    assert all(same_answer(one[1].capitalize() + ".", one[1]) for one in asked if one and kind != "describe")


def test_training_asks_every_kind_of_question_and_the_answers_are_true():
    rng, asked = random.Random(7), {}
    for _ in range(600):
        made = drill(rng, lambda: sample_scene(rng))
        asked.setdefault(made.kind, []).append(made)
        assert len(made.references) == (2 if made.kind in PAIRED else 1)
    assert set(asked) == set(DRILL)
    for made in asked["which"]:
        assert made.frames[0][0] in ("the first", "the second")
    described = [made for made in asked["of two"] if made.instruction.startswith("Describe")]
    assert {" first " in made.instruction for made in described} == {True, False}
    for made in described:
        assert made.frames[0][0] == description(made.references[" second " in made.instruction])
    counted = [made for made in asked["of two"] if "How many objects" in made.instruction]
    for made in counted:
        scene = made.references["in the second picture?" in made.instruction]
        assert made.frames[0][0] == NUMBERS[len(scene.things)]
    assert described
    assert counted


def test_captions_differ_but_leave_no_doubt():
    scene = Scene((Thing("circle", "red", "large", "left"), Thing("square", "blue", "small", "right")), "yellow")
    texts = {caption(scene, random.Random(seed)) for seed in range(40)}
    assert len(texts) > 10
    assert all("red circle" in text and "small blue square" in text and "yellow background" in text for text in texts)


def test_the_tokenizer_is_always_the_same_and_gives_every_text_back():
    one, other = build(shapes()), build(shapes())
    assert one.to_str() == other.to_str()
    words = vocabulary(one, SHAPES)
    rng = random.Random(2)
    for _ in range(100):
        text = example(rng).instruction
        assert words.decode(words.encode(text)) == text
    assert words.decode(words.encode("Größe? \u56f3")) == "Größe? \u56f3"
    assert all(one.token_to_id(token) is not None for token in SPECIAL)
    assert words.read_header(words.header(8, 6)) == (8, 6)
