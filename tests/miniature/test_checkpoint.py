"""What a run writes opens in the engine and does everything, however short the run was."""

import pytest
import torch
from safetensors.torch import load_file

from llada_core.engine import LLaDAUni
from llada_core.options import Decoding, Sampling, Sprint

SHORT = Sampling(thinking_length=40)


@pytest.fixture(scope="module")
def model(short_checkpoint) -> LLaDAUni:
    return LLaDAUni(short_checkpoint)


def test_it_is_whole_and_small(world, short_checkpoint, model):
    assert not model.layout.missing
    size = sum(file.stat().st_size for file in short_checkpoint.rglob("*") if file.is_file())
    assert size <= {"shapes": 25e6, "signs": 60e6}[world.name]
    assert f"--world {world.name}" in (short_checkpoint / "README.md").read_text()
    assert "| backbone | 2 |" in (short_checkpoint / "README.md").read_text()
    weights = load_file(short_checkpoint / "model.safetensors")
    assert weights["model.layers.1.mlp.experts.7.down_proj.weight"].dtype == torch.bfloat16
    assert weights["model.layers.1.mlp.gate.expert_bias"].dtype == torch.float32


def test_it_draws_edits_answers_and_tells(world, model):
    rows, columns = world.grids[1]
    height, width = 32 * rows, 32 * columns
    drawn = model.generate("a red circle", height, width, sprint=Sprint())
    assert drawn.tokens.sizes == [(rows, columns)]
    (picture,) = model.decode(drawn.tokens, Decoding(turbo=True, steps=2))
    (slow,) = model.decode(drawn.tokens, Decoding(turbo=False, steps=2))
    assert picture.shape == slow.shape == (height, width, 3)
    seen = model.encode(picture[None])
    assert seen.sizes == [(rows, columns)]
    assert model.encode(picture[None], "understand").sizes == [(rows, columns)]
    assert model.generate("make it blue", references=seen).tokens.sizes == [(rows, columns)]
    assert isinstance(model.answer("What is it?", seen, max_new_tokens=8).text, str)
    assert isinstance(model.generate("a star", 256, 256, thinking=True, sampling=SHORT).thinking, str)
    assert isinstance(model.interleave("A story", 1, sampling=SHORT).text, str)
