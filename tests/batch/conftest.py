"""Fixtures of the batch program's tests: the miniature, and files of requests."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from llada_core import ImageTokens, LLaDAUni, save_tokens

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def miniature() -> Path:
    """The checkpoint that comes with the pack."""
    return ROOT / "checkpoints" / "miniature"


@pytest.fixture(scope="session")
def model(miniature) -> LLaDAUni:
    """The miniature, opened once."""
    return LLaDAUni(miniature)


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    """write(request, ...) -> a file of requests: a line for each dictionary, and texts as they are."""

    def write(*requests: dict | str) -> Path:
        path = tmp_path / "requests.jsonl"
        lines = [one if isinstance(one, str) else json.dumps(one) for one in requests]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def files(tmp_path) -> Path:
    """The folder of `write`, with photo.png (96 x 64), wide.png (128 x 64), one.safetensors and two.safetensors."""
    for name, size in (("photo.png", (96, 64)), ("wide.png", (128, 64))):
        Image.new("RGB", size, (200, 30, 30)).save(tmp_path / name)
    grid = torch.arange(4).view(2, 2)
    save_tokens(ImageTokens((grid,), 1024), tmp_path / "one.safetensors")
    save_tokens(ImageTokens((grid, grid), 1024), tmp_path / "two.safetensors")
    return tmp_path
