"""The README's sizes of the released parts in each form are those that the code computes from the configuration."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks.fullsize import released
from llada_core.backbone.keys import keep_float32
from llada_core.backbone.model import Backbone
from llada_core.checkpoint.component import Component
from llada_core.checkpoint.weights import PickledTensors
from llada_core.decoder.transformer import SemanticDecoder
from llada_core.quantization.choices import asked_form, quantizable
from llada_core.quantization.formats import FP8Block

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
FORMS = {"as released, bf16": None, "FP8 release": "fp8", "8-bit": "8-bit", "4-bit": "4-bit"}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table(heading: str) -> dict[str, list[str]]:
    """First cell -> the others, of the table whose first row begins so."""
    lines = README[README.index(heading) :].splitlines()
    rows = lines[: lines.index("")]
    return {cells(row)[0]: cells(row)[1:] for row in rows}


@pytest.fixture(scope="module")
def sizes() -> dict[str, dict[str, float]]:
    """Part -> form -> GB."""
    configs = released()
    with torch.device("meta"):
        modules = {
            "backbone": Backbone(configs.backbone),
            "decoder-turbo": SemanticDecoder(**configs.decoder, cap_feat_dim=configs.features),
        }
    found = {}
    for part, module in modules.items():
        layers = quantizable(part.removesuffix("-turbo"), module)
        kept = keep_float32 if part == "backbone" else lambda name: False
        component = Component(module, PickledTensors.__new__(PickledTensors), {}, kept, quantizable=layers)
        found[part] = {
            name: component.bytes(torch.bfloat16, _asked(choice, part)) / 1e9 for name, choice in FORMS.items()
        }
    return found


def _asked(choice: str | None, part: str):
    if choice == "fp8":
        return FP8Block() if part == "backbone" else None
    return None if choice is None else asked_form(choice, part)


def test_sizes_of_the_parts(sizes):
    rows = table("| GB | as released, bf16 |")
    assert rows["GB"] == list(FORMS)
    for name, part in {"language model": "backbone", "each decoder": "decoder-turbo"}.items():
        assert rows[name] == [f"{sizes[part][form]:.1f}" for form in FORMS]
    rest = 0.4  # the SigVQ embedder and the VAE
    totals = [f"{sizes['backbone'][form] + sizes['decoder-turbo'][form] + rest:.1f}" for form in FORMS]
    assert rows["all of a picture, turbo"] == totals


def test_what_to_choose(sizes):
    """What a row says of the card holds on the smallest card that it names."""
    rows = table("| card | choose | on the card |")
    forms = {"40 GB and more": "as released, bf16", "20 to 24 GB": "8-bit", "12 to 16 GB": "4-bit", "8 GB": "4-bit"}
    working, decoding = 0.8, 0.6  # the table of working memory, at 1024 x 1024
    for card, form in forms.items():
        choice, where, memory = rows[card]
        room = float(re.match(r"\d+", card)[0])
        assert ("as stored" if form.startswith("as") else form) in choice
        needed = sizes["backbone"][form] + working
        if where.startswith("all"):
            assert where == f"all: {needed:.1f} GB, then the decoder"
            assert needed < 0.95 * room
        else:
            assert where == f"two thirds; the decoder whole: {sizes['decoder-turbo'][form] + decoding:.1f} GB"
            assert 0.6 < (0.95 * room - working) / sizes["backbone"][form] < 0.7
            assert sizes["decoder-turbo"][form] + decoding < 0.95 * room
        together = sizes["backbone"][form] + sizes["decoder-turbo"][form] + 0.4
        assert float(re.match(r"\d+", memory)[0]) > 1.05 * together
