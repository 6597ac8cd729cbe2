"""The sentences that README and the miniature's own template propose work as they stand there."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dev.hosts.base_folder import GRAPHS, MINIATURE, ROOT
from dev.hosts.scenes import PROMPTS, SHOWN, TRIED
from dev.miniature.checker import look
from dev.miniature.world import Scene, Thing, render
from llada_core import Decoding, LLaDAUni, OneDevice

README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTE = next(
    node["widgets_values"][0]
    for node in json.loads((GRAPHS.parent / "miniature.json").read_text(encoding="utf-8"))["nodes"]
    if node["type"] == "MarkdownNote"
)
(PAIR,) = SHOWN["text-to-image"]
STAR, DIAMOND = PAIR.things
DRAWN = {
    "a small green circle to the left of a large red square on a white background": Scene(
        (Thing("circle", "green", "small", "left"), Thing("square", "red", "large", "right")), "white"
    ),
}
EDITED = {
    "make the blue star yellow": PAIR.with_things((replace(STAR, colour="yellow"), DIAMOND)),
    "move the blue star to the left": PAIR.with_things((replace(STAR, place="left"), DIAMOND)),
    "remove the red diamond": PAIR.with_things((STAR,)),
}
ANSWERED = {
    "Describe the picture.": TRIED["image-qa"].said,
    "What colour is the star?": "blue",
    "How many objects are there?": "two",
}


@pytest.fixture(scope="module")
def model():
    """The miniature on the CPU."""
    return LLaDAUni(MINIATURE, OneDevice("cpu"))


@pytest.fixture(scope="module")
def picture():
    """What the template draws, float32 [1, height, width, 3]."""
    return torch.from_numpy(np.asarray(render(PAIR), dtype=np.float32) / 255)[None]


def check(model, tokens, scene: Scene) -> None:
    """What the tokens show is the scene."""
    pixels = model.decode(tokens, Decoding(turbo=True))[0]
    found = look((pixels.numpy() * 255).round().astype(np.uint8))
    assert (found.things, found.background) == (scene.things, scene.background)


@pytest.mark.parametrize("sentence", DRAWN)
def test_drawing(model, sentence):
    check(model, model.generate(sentence, 256, 256).tokens, DRAWN[sentence])


@pytest.mark.parametrize("sentence", EDITED)
def test_editing(model, picture, sentence):
    references = model.encode(picture, purpose="edit")
    check(model, model.generate(sentence, references=references).tokens, EDITED[sentence])


@pytest.mark.parametrize("sentence", ANSWERED)
def test_asking(model, picture, sentence):
    assert model.answer(sentence, model.encode(picture, purpose="understand")).text == ANSWERED[sentence]


@pytest.mark.parametrize("sentence", [*DRAWN, *EDITED, *ANSWERED, PROMPTS["story"]])
def test_they_stand_in_the_readme_and_in_the_note(sentence):
    assert sentence in README
    assert sentence in NOTE


@pytest.mark.parametrize("name", ["thinking-text-to-image", "edit-two-references"])
def test_the_readme_has_the_prompts_that_the_workflows_are_run_with(name):
    assert PROMPTS[name] in README
