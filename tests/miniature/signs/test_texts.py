"""What is said about the harder world is true, and can be read back; wordings held out are not those of training."""

import random
import re
from dataclasses import replace

import pytest

from dev.miniature.signs import chinese, edits, handwritten, plans, questions, stories
from dev.miniature.signs.checker import changed_places
from dev.miniature.signs.examples import DRILL, PAIRED, SPLITS, TASKS, drill, example
from dev.miniature.signs.texts import caption, read_scene, same_answer, told
from dev.miniature.signs.wording import NUMBERS, Wording, short
from dev.miniature.signs.world import (
    GRIDS,
    SHOWN,
    TOLD,
    Scene,
    Sign,
    Thing,
    belongs,
    layout,
    problem,
    sample_scene,
)


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng, split=None) for _ in range(count)]


def test_a_scene_can_be_read_back_from_its_text():
    drawn = scenes(300)
    assert all(read_scene(told(scene), scene.grid) == scene for scene in drawn)
    assert len({told(replace(scene, grid=GRIDS[0])) for scene in drawn}) == len(
        {replace(scene, grid=GRIDS[0]) for scene in drawn}
    )
    assert read_scene("white; left: large red dog", GRIDS[0]) is None
    assert read_scene("nowhere", GRIDS[0]) is None


def test_captions_name_every_shape_colour_and_word_and_differ():
    for scene in scenes(200, 1):
        for new in (False, True):
            text = caption(scene, Wording(random.Random(3), new)).lower()
            for thing in scene.things:
                assert thing.colour in text
                assert {"cross": "cross|plus sign", "diamond": "diamond|rhombus"}.get(thing.shape, thing.shape)
                assert re.search(
                    {"cross": "cross|plus sign", "diamond": "diamond|rhombus"}.get(thing.shape, thing.shape), text
                )
            assert scene.sign is None or scene.sign.text.lower() in text
        in_chinese = chinese.caption(scene, random.Random(1))
        assert all(chinese.words()["shapes"][thing.shape] in in_chinese for thing in scene.things)
    scene = Scene((Thing("star", "red", "small", place="left"), Thing("heart", "blue", place="right")), "sea")
    assert len({caption(scene, Wording(random.Random(seed))) for seed in range(100)}) > 60


def test_defaults_are_the_only_things_left_unsaid():
    """A small thing is always called small, a place or a layout is given, and a background but white is named."""
    for seed, scene in enumerate(scenes(200, 5)):
        text = caption(scene, Wording(random.Random(seed)))
        small = any(thing.size == "small" for thing in scene.things)
        assert bool(re.search(r"\b(small|little|tiny)\b", text)) == small
        if scene.background in ("meadow", "beach", "sea", "night"):
            assert scene.background in text


def test_wordings_held_out_are_forms_that_training_never_has():
    scene = Scene((Thing("star", "red", place="top left"),))
    trained = {caption(scene, Wording(random.Random(seed))) for seed in range(400)}
    new = {caption(scene, Wording(random.Random(seed), True)) for seed in range(100)}
    assert not any("in the upper left" in text and "upper left" in text for text in trained)
    assert all("in the upper left" in text for text in new)
    one = Wording(random.Random(0), True)
    assert edits.change(Scene((Thing("star", "red"),)), one, "recolour")[0].startswith(("turn the", "I want the"))


@pytest.mark.parametrize("kind", plans.KINDS)
def test_plans_end_in_the_scene_and_their_reasons_are_right(kind):
    w = Wording(random.Random(kind))
    for _ in range(60):
        prompt, why, scene = plans.planned(w, kind, GRIDS[0])
        assert problem(scene) is None
        assert plans.read_thought(plans.thought(why, scene), GRIDS[0]) == scene
        for one, operation, other, result in re.findall(r"(\w+) (plus|minus) (\w+) is (\w+)", why):
            value = [NUMBERS.index(n) if n in NUMBERS else int(n) for n in (one, other, result)]
            assert value[0] + value[1] * (1 if operation == "plus" else -1) == value[2], why
        if kind in ("sum", "both"):
            assert tuple(thing.place for thing in scene.things) == layout(len(scene.things))
        if kind in ("mixture", "both"):
            made = re.findall(r"(\w+) and (\w+) make (\w+)", why)
            assert all(plans.MIXTURES[tuple(sorted((x, y)))] == z for x, y, z in made)
            assert not made or made[0][2] in {thing.colour for thing in scene.things}
        assert told(scene) not in prompt


@pytest.mark.parametrize("kind", [*questions.KINDS, *PAIRED])
def test_answers_are_true(kind):
    rng = random.Random(kind)
    for _ in range(40):
        made = example(rng, "train", "understand", kind)
        answer, asked, scene = made.frames[0][0], made.instruction, made.references[0]
        assert answer
        if kind == "where":
            named = [short(thing) for thing in scene.things if short(thing) in asked]
            assert any(thing.place == answer and short(thing) in named for thing in scene.things)
        elif kind == "read":
            assert answer == scene.sign.text
        elif kind == "describe":
            assert read_scene(answer, scene.grid) == scene
        elif kind == "behind":
            assert answer[2:].strip() in {short(thing) for thing in scene.things}
        elif kind == "touch":
            assert answer in ("yes", "no") or answer[2:].strip() in {short(thing) for thing in scene.things}
        elif kind == "which":
            assert answer in ("the first", "the second")
        elif kind in ("compare", "beside"):
            assert answer in ("yes", "no")


def test_counting_and_comparing_by_hand():
    scene = Scene(
        (
            Thing("star", "red", place="left"),
            Thing("star", "blue", place="centre"),
            Thing("heart", "red", place="right"),
        )
    )
    asked = {}
    for seed in range(300):
        w = Wording(random.Random(seed))
        for kind in ("count", "compare", "beside"):
            if made := questions.question(scene, w, kind):
                asked[made[0]] = made[1]
    assert asked["How many stars are there?"] == "two"
    assert asked["Count the red objects."] == "two"
    assert asked["How many objects are there?"] == "three"
    assert asked["Are there more stars than hearts?"] == "yes"
    assert asked["Are there more hearts than stars?"] == "no"
    assert asked["Is the red star left of the red heart?"] == "yes"
    assert asked["Is the blue star right of the red heart?"] == "no"


def test_touching_by_hand():
    small = Thing("circle", "blue", "small", place="left"), Thing("star", "red", "small", place="left", touching=True)
    scene = Scene((*small, Thing("heart", "green", place="right")))
    assert told(scene).endswith("left: small blue circle, touching small red star; right: large green heart")
    asked = dict(filter(None, (questions.question(scene, Wording(random.Random(s)), "touch") for s in range(300))))
    assert asked["What touches the red star?"] == "a blue circle"
    assert asked["Does the red star touch the blue circle?"] == "yes"
    assert asked["Do the green heart and the red star touch?"] == "no"


@pytest.mark.parametrize("kind", edits.KINDS)
def test_edits_change_something_and_what_they_lead_to_is_of_this_world(kind):
    rng = random.Random(kind)
    for _ in range(30):
        made = example(rng, "train", "edit", kind)
        before, after = made.references[0], made.scenes[-1]
        assert problem(after) is None
        assert after.grid == before.grid
        assert before.grid in SHOWN
        changed = changed_places(before, after)
        assert changed
        if kind in ("recolour", "replace", "resize", "refill", "add", "remove", "cover", "transfer"):
            assert len(changed) == 1
            assert edits.only_place(before, after) in changed
        assert kind != "text" or changed == {"sign"}
        if kind == "text" and (found := re.search(r'(?:to|write|say|with|into) "([A-Z0-9]+)"', made.instruction)):
            assert after.sign.text == found[1]


@pytest.mark.parametrize("kind", stories.KINDS)
def test_stories_agree_in_text_and_pictures(kind):
    rng = random.Random(kind)
    lengths = set()
    for _ in range(40):
        made = example(rng, "train", "story", kind)
        *frames, (last, none) = made.frames
        assert (last, none) == (stories.ENDING, None)
        lengths.add(len(frames))
        for text, scene in frames:
            assert problem(scene) is None
            assert scene.grid == TOLD
            said = text.rstrip(".").split()[-1]
            if kind == "colour":
                assert scene.things[0].colour == said
            elif kind == "place":
                assert text.endswith(f": {scene.things[0].place}.")
            elif kind == "word":
                assert scene.sign.text == said
            else:
                assert NUMBERS[len(scene.things)] in text
    assert lengths == {2, 3, 4}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_examples_are_of_their_split(task, split):
    rng = random.Random(f"{task} {split}")
    for _ in range(15):
        made = example(rng, split, task)
        assert made.task == task
        judged = made.scenes if split == "train" else made.scenes[-1:]
        assert all(belongs(scene, "held-out" if split == "wording" else split) for scene in judged)


def test_training_asks_every_kind_of_question():
    rng = random.Random(1)
    kinds = {drill(rng, lambda: sample_scene(rng)).kind for _ in range(600)}
    assert kinds == {*questions.KINDS, *PAIRED}
    assert sum(DRILL.values()) < 1


def test_the_handwritten_prompts_are_many_and_mean_something():
    made = handwritten.examples()
    assert len(made) >= 100
    assert len({one.instruction for one in made}) == len(made)
    known = {caption(one.scenes[0], Wording(random.Random(s))) for one in made[:20] for s in range(20)}
    assert not known & {one.instruction for one in made}


def test_answers_are_compared_without_case_and_stop():
    assert same_answer("Top left.", "top left")
    assert not same_answer("top", "top left")
    assert told(Scene((), sign=Sign("GO", "red", "top"))) == "white; top: GO in red"
