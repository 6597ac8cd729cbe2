"""The harder world: its scenes, what may not be in one, and what training never sees."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dev.miniature.signs import font, looks
from dev.miniature.signs.drawing import render, seen
from dev.miniature.signs.world import (
    BACKGROUNDS,
    GRIDS,
    PLACES,
    SHAPES,
    SIGNED,
    TOKEN,
    Scene,
    Sign,
    Thing,
    belongs,
    box_of,
    cell_of,
    held_apart,
    held_out,
    layout,
    problem,
    sample_scene,
)


def scenes(count: int, seed: int = 0, split: str | None = None) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng, split=split) for _ in range(count)]


def test_scenes_are_of_this_world_and_have_all_of_it():
    drawn = scenes(1500)
    assert not [problem(scene) for scene in drawn if problem(scene)]
    assert {len(scene.things) for scene in drawn} == set(range(1, 7))
    assert {scene.background for scene in drawn} == set(BACKGROUNDS)
    assert {scene.grid for scene in drawn} == set(GRIDS)
    assert {scene.sign.place for scene in drawn if scene.sign} == set(SIGNED)
    assert {len(scene.sign.text) for scene in drawn if scene.sign} == {1, 2, 3, 4, 5}
    assert any(thing.front for scene in drawn for thing in scene.things)
    assert any(thing.touching for scene in drawn for thing in scene.things)
    assert {(thing.shape, thing.fill) for scene in drawn for thing in scene.things} == {
        (shape, fill) for shape in SHAPES for fill in ("plain", "striped", "hollow")
    }


@pytest.mark.parametrize(
    ("scene", "rule"),
    [
        (Scene(()), "something to see"),
        (Scene((Thing("star", "white"),)), "colours that are seen"),
        (Scene((Thing("star", "red"), Thing("circle", "blue"))), "one thing a place"),
        (Scene((Thing("star", "red", "small", "striped"),)), "small things are plain"),
        (Scene((Thing("star", "red", "small", front=True),)), "in front is small"),
        (Scene((Thing("star", "red"), Thing("circle", "red", "small", front=True))), "in front is small"),
        (Scene((Thing("star", "red"), Thing("circle", "blue", "small", touching=True))), "touching is small"),
        (Scene((Thing("star", "red", "small", touching=True),)), "touching is small"),
        (Scene((Thing("star", "red", place="right"), Thing("star", "red", place="left"))), "things in order"),
        (Scene((Thing("star", "red"),), sign=Sign("CAT", "black", "centre")), "a word at a free place"),
        (Scene((), sign=Sign("CAT", "white", "centre")), "an ink that is seen"),
        (Scene((), sign=Sign("cat", "black", "centre")), "one to five characters"),
        (Scene((Thing("star", "red"),), "desert"), "a known background"),
    ],
)
def test_what_is_none_of_this_world_is_told(scene, rule):
    assert problem(scene).startswith(rule)


@pytest.mark.parametrize("grid", GRIDS)
def test_nothing_overlaps_but_what_is_in_front(grid):
    taken = np.zeros(grid, dtype=int)
    for place in PLACES:
        row, column, side = box_of(Thing("star", "red", place=place), grid)
        taken[row : row + side, column : column + side] += 1
    assert taken.max() == 1
    assert taken.sum() == 9 * 9
    for place in PLACES:
        row, column, side = box_of(Thing("star", "red", "small", place=place, touching=True), grid)
        beside = taken[row : row + side, column : column + side]
        assert beside.shape == (2, 2)
        assert beside[:, 0].sum() == 0  # of its two columns the right one lies in the place, where nothing small is
        assert column + side == box_of(Thing("star", "red", "small", place=place), grid)[1]
    for place in SIGNED:
        signed = np.zeros(grid, dtype=int)
        for index in range(5):
            row, column = cell_of(Sign("HELLO", "black", place), index, grid)
            signed[row : row + 2, column] += 1
        others = taken.copy()
        row, column, side = box_of(Thing("star", "red", place=place), grid)
        others[row : row + side, column : column + side] = 0
        assert not (others * signed).any()
        assert signed.sum() == 10


def test_splits_are_shares_of_all_and_apart_from_each_other():
    drawn = scenes(2000, 3)
    assert 0.08 < np.mean([held_out(scene) for scene in drawn]) < 0.13
    assert 0.05 < np.mean([held_apart(scene) for scene in drawn]) < 0.13
    for scene in drawn:
        assert [belongs(scene, split) for split in ("train", "held-out", "combination")].count(True) == 1
        assert held_out(scene) == held_out(replace(scene, grid=GRIDS[1]))
    assert all(belongs(scene, "combination") for scene in scenes(20, 1, "combination"))


def test_a_scene_has_one_picture():
    for scene in scenes(5):
        picture = render(scene)
        assert picture.size == (scene.grid[1] * TOKEN, scene.grid[0] * TOKEN)
        assert np.array_equal(np.asarray(picture), np.asarray(render(scene)))


def test_a_view_is_what_resizing_the_whole_picture_gives():
    for scene in scenes(60, 9):
        picture = render(scene)
        half = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BICUBIC)
        assert np.array_equal(seen(scene), np.asarray(half))


def test_layouts_stand_apart_from_a_sign():
    for count in range(1, 7):
        assert len(layout(count)) == count
    assert layout(1, Sign("GO", "red", "centre")) is None
    assert layout(2, Sign("GO", "red", "centre")) == ("left", "right")


def test_letters_differ_in_more_than_a_dot():
    cells = [font.glyph(character) for character in font.CHARACTERS]
    dot = font.DOT[0] * font.DOT[1]
    for i, one in enumerate(cells):
        for other in cells[:i]:
            assert np.abs(one - other).sum() >= 2 * dot


def test_looks_say_what_lies_on_top():
    scene = Scene(
        (Thing("square", "red", "large", "plain", "left"), Thing("circle", "blue", "small", "plain", "left", True)),
        "meadow",
        Sign("A", "black", "top"),
    )
    told = {name: value.reshape(*scene.grid, *value.shape[1:]) for name, value in looks.targets(scene).items()}
    tint = lambda row, column: looks.TINTS[told["colour"][row, column]]  # noqa: E731
    row, column, _ = box_of(scene.things[0], scene.grid)
    assert (tint(row, column), tint(row + 1, column + 1), tint(row + 2, column + 2)) == ("red", "blue", "blue")
    assert (tint(0, 0), tint(15, 0)) == ("sky", "green")
    assert told["kind"][0, 0] == told["kind"][15, 0] == 0
    assert tint(*cell_of(scene.sign, 0, scene.grid)) == "black"
    assert told["cover"][row, column].max() == 1
    assert looks.targets(replace(scene, background="night"))["kind"].min() == 1
    known, numbers = looks.patterns()
    assert len(known) == max(numbers.values()) + 1
