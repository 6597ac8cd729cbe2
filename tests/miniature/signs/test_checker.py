"""The checker reads this world's own drawings right, also blurred ones, and sees what is wrong with others."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from dev.miniature.signs.checker import changed_places, look, preserved
from dev.miniature.signs.drawing import render
from dev.miniature.signs.world import TOKEN, Scene, Sign, Thing, in_order, sample_scene

SCENE = Scene(
    in_order(
        (
            Thing("circle", "red", "large", "plain", "left"),
            Thing("star", "blue", "small", "plain", "left", True),
            Thing("heart", "green", "large", "striped", "bottom right"),
            Thing("cross", "black", "small", "plain", "top"),
        )
    ),
    "yellow",
    Sign("CAT", "black", "bottom"),
)


def scenes(count: int, seed: int) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng, split=None) for _ in range(count)]


def blurred(picture: Image.Image, seed: int) -> np.ndarray:
    """The picture as a decoder that is a little off would give it: float, soft edges, some noise."""
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(1.6)), dtype=np.float64)
    return (soft + np.random.default_rng(seed).normal(0, 7, soft.shape)).clip(0, 255) / 255


def test_true_and_blurred_drawings_are_read_right():
    for seed, scene in enumerate(scenes(40, 11)):
        picture = render(scene)
        assert look(np.asarray(picture)).shows(scene), scene
        assert look(blurred(picture, seed)).shows(scene), scene


def other(thing: Thing, **change) -> Scene:
    return SCENE.with_things([replace(t, **change) if t is thing else t for t in SCENE.things])


cross, circle, star, heart = SCENE.things
WRONG = {
    "another background": replace(SCENE, background="white"),
    "a scene as background": replace(SCENE, background="beach"),
    "one missing": SCENE.with_things(SCENE.things[:-1]),
    "nothing in front": SCENE.with_things((cross, circle, heart)),
    "another colour": other(heart, colour="blue"),
    "another shape": other(heart, shape="circle"),
    "another fill": other(heart, fill="hollow"),
    "another size": other(cross, size="large"),
    "another place": SCENE.with_things((cross, circle, star, replace(heart, place="right"))),
    "another in front": other(star, shape="circle"),
    "another behind": other(circle, shape="square"),
    "another word": replace(SCENE, sign=Sign("CAR", "black", "bottom")),
    "a longer word": replace(SCENE, sign=Sign("CATS", "black", "bottom")),
    "another ink": replace(SCENE, sign=Sign("CAT", "red", "bottom")),
    "no word": replace(SCENE, sign=None),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_scene_that_differs_is_told_apart(what):
    picture = render(WRONG[what])
    assert look(np.asarray(picture)).shows(WRONG[what])
    assert not look(np.asarray(picture)).shows(SCENE)
    assert not look(blurred(picture, 1)).shows(SCENE)


PAIR = Scene(
    (Thing("heart", "red", "small", place="left"), Thing("star", "blue", "small", "plain", "left", touching=True))
)
right, left = PAIR.things
MISSED = {
    "nothing touching": PAIR.with_things((right,)),
    "the left one alone": PAIR.with_things((replace(left, touching=False),)),
    "the two the other way round": PAIR.with_things((replace(left, touching=False), replace(right, touching=True))),
    "another colour": PAIR.with_things((right, replace(left, colour="green"))),
    "another shape": PAIR.with_things((replace(right, shape="circle"), left)),
}


@pytest.mark.parametrize("what", MISSED)
def test_what_does_not_touch_as_it_should_is_told_apart(what):
    assert look(blurred(render(PAIR), 2)).shows(PAIR)
    assert look(np.asarray(render(MISSED[what]))).shows(MISSED[what])
    assert not look(blurred(render(MISSED[what]), 3)).shows(PAIR)


def damaged(how: str) -> Image.Image:
    picture = render(SCENE)
    draw = ImageDraw.Draw(picture)
    if how == "a stray blob":
        draw.ellipse((300, 190, 340, 230), fill=(214, 48, 49))
    elif how == "an object at no place":
        picture.paste(picture.crop((0, 0, 3 * TOKEN, 3 * TOKEN)), (12 * TOKEN, 12 * TOKEN))
        picture.paste(render(SCENE).crop((12 * TOKEN, 12 * TOKEN, 15 * TOKEN, 15 * TOKEN)), (11 * TOKEN, 9 * TOKEN))
    elif how == "a shifted object":
        heart_at = (12 * TOKEN, 12 * TOKEN, 15 * TOKEN, 15 * TOKEN)
        part = picture.crop(heart_at)
        draw.rectangle(heart_at, fill=(245, 215, 60))
        picture.paste(part, (12 * TOKEN, 11 * TOKEN))
    elif how == "half an object":
        draw.rectangle((12 * TOKEN, 12 * TOKEN, 13.5 * TOKEN, 15 * TOKEN), fill=(245, 215, 60))
    elif how == "a letter scratched out":
        draw.rectangle((7 * TOKEN, 12 * TOKEN, 8 * TOKEN - 1, 14 * TOKEN), fill=(30, 30, 35))
    elif how == "an object in two colours":
        draw.rectangle((12 * TOKEN, 12 * TOKEN, 15 * TOKEN, 13.2 * TOKEN), fill=(50, 90, 200))
    elif how == "a part of another background":
        draw.rectangle((0, 0, 512, 40), fill=(245, 150, 190))
    else:
        raise ValueError(how)
    return picture


@pytest.mark.parametrize(
    "how",
    [
        "a stray blob",
        "an object at no place",
        "a shifted object",
        "half an object",
        "a letter scratched out",
        "an object in two colours",
        "a part of another background",
    ],
)
def test_a_damaged_picture_shows_nothing_right(how):
    assert not look(np.asarray(damaged(how))).shows(SCENE)
    assert not look(blurred(damaged(how), 2)).shows(SCENE)


def test_an_edit_that_touched_the_rest_is_seen():
    after = other(heart, colour="blue")
    changed = changed_places(SCENE, after)
    assert changed == {"bottom right"}
    assert preserved(SCENE, look(np.asarray(render(after))), changed)
    assert not preserved(SCENE, look(np.asarray(render(after))), set())
    for more in (replace(after, background="white"), replace(after, sign=None)):
        assert not preserved(SCENE, look(np.asarray(render(more))), changed)
        assert preserved(SCENE, look(np.asarray(render(more))), changed | {"background", "sign"})


def test_another_size_is_refused():
    with pytest.raises(ValueError, match="tokens"):
        look(np.zeros((256, 256, 3), dtype=np.uint8))
