"""The checkpoint that comes with the pack: whole, small, and with a card that says what it can do."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.quality import Quality, measurements
from dev.hosts.scenes import FIRST, SECOND
from dev.miniature.export import STAGES
from dev.miniature.sizes import SHAPES
from llada_core.engine import LLaDAUni
from llada_core.options import Sprint

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "checkpoints" / "miniature"


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
    assert {key: config[key] for key in SHAPES.backbone} == SHAPES.backbone
    assert json.loads((SHIPPED / "image_tokenizer" / "preprocessor_config.json").read_text()) == SHAPES.preprocessor


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its first two lines."""
    lines = page.split(heading, 1)[1].splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("|"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[first + 2 :])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_card_tells_of_every_stage_of_the_training():
    card = (SHIPPED / "README.md").read_text()
    rows = table(card, "# A miniature")
    assert [row[0] for row in rows] == list(STAGES)
    for stage, steps, minutes, device, figures in rows:
        assert int(steps.replace(",", "")) > 100, stage
        assert float(minutes) > 0, stage
        assert device, stage
        assert re.match(r"loss \d", figures), stage


def test_the_card_has_the_figures_of_the_benchmark_and_the_readme_repeats_them():
    rows = table((SHIPPED / "README.md").read_text(), "## Measured")
    assert [row[0] for row in rows] == list(measurements(Quality(None, 0, 0)))
    assert all(0 <= float(row[1]) <= 100 for row in rows)
    measured = [(float(right), float(rounds), float(speed)) for _, right, rounds, speed, _ in rows if speed]
    told = table((ROOT / "docs" / "miniature.md").read_text(encoding="utf-8"), "What it gets right")
    assert len(told) > 5
    for task, *cells in told[1:]:  # the first names the columns once more
        for figures in (cells[:3], cells[3:6]):
            if any(figures):
                right, rounds, speed = (float(figure.replace(",", "")) for figure in figures)
                assert any((r, n) == (right, rounds) and abs(s - speed) <= 0.5 for r, n, s in measured), task


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
