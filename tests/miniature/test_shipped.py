"""The checkpoint that comes with the pack: whole, small, and with a card that says what it can do."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.quality import Quality
from dev.hosts.scenes import FIRST, SECOND
from dev.miniature.sizes import BACKBONE, PREPROCESSOR
from llada_core.engine import LLaDAUni
from llada_core.options import Sprint

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "miniature"


@pytest.fixture(scope="module")
def model() -> LLaDAUni:
    return LLaDAUni(SHIPPED)


def test_it_is_whole_small_and_without_strange_files(model):
    assert not model.layout.missing
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25e6
    assert {path.suffix for path in files} <= {".json", ".md", ".pt", ".safetensors"}
    weights = load_file(SHIPPED / "model.safetensors")
    assert {w.dtype for key, w in weights.items() if ".mlp.gate." not in key} == {torch.bfloat16}


def test_it_is_what_the_training_builds():
    config = json.loads((SHIPPED / "config.json").read_text())
    assert {key: config[key] for key in BACKBONE} == BACKBONE
    assert json.loads((SHIPPED / "image_tokenizer" / "preprocessor_config.json").read_text()) == PREPROCESSOR


def test_the_card_has_every_stage_and_every_figure():
    card = (SHIPPED / "README.md").read_text()
    for stage in ("vae", "vision", "decoder", "turbo", "backbone"):
        assert f"| {stage} |" in card
    for row in ("redraw", "draw, plain", "draw, SPRINT", "questions, plain", "edit, plain", "stories, plain"):
        assert f"| {row} |" in card


@pytest.mark.parametrize("sprint", [None, Sprint()])
def test_a_plan_says_all_that_was_asked(model, sprint):
    drawn = model.generate("a small white star on a red background", 256, 256, thinking=True, sprint=sprint)
    assert drawn.thinking == "one star, white, small, centre; red background"


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("Which picture has a yellow star?", "the second"),
        ("Which picture has an orange square?", "the first"),
        ("Which picture has more objects?", "the first"),
        ("Where is the orange square in the first picture?", "on the right"),
        ("What colour is the background in the second picture?", "green"),
    ],
)
def test_it_finds_what_is_asked_for_in_two_pictures(model, asked, answer):
    tokens = Quality(model, 0, 0).encode((FIRST, SECOND), "understand")
    assert model.answer(asked, tokens, max_new_tokens=32).text == answer
