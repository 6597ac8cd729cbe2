"""benchmarks/small_cards.py on small sizes: the same path as on a GPU, without one. Needs a real ComfyUI."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.fullsize import tiny
from benchmarks.random_folder import Tensor, Vision, backbone_files, share_of_experts, write_folder, write_tensors
from llada_core.backbone.config import BackboneConfig
from llada_core.backbone.keys import open_backbone
from llada_core.checkpoint.weights import TensorFiles
from llada_core.engine import LLaDAUni
from llada_core.options import Decoding
from llada_core.quantization.formats import Int4, Int8

ROOT = Path(__file__).parents[2]
NARROW = {"hidden_size": 256, "moe_intermediate_size": 8, "intermediate_size": 64, "num_hidden_layers": 4}
MANY = {"num_experts": 64, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "head_dim": 64, "rope_theta": 6e5}


def test_the_program_runs(comfyui, tmp_path):
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.small_cards", "--tiny", "--opening", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(file.read_text())["figures"]
    assert figures["second picture, s"] > 0
    assert 0 < figures["experts that a round hits, share"] <= 1
    assert figures["second question, s"] > 0
    assert figures["second edit, tokens alone, s"] > 0
    assert figures["with mapped file pages, GB"] >= figures["server's main memory, GB"] > 0


def hits(folder: Path, config: BackboneConfig) -> float:
    """The share of the experts that a first round hits."""
    files = TensorFiles("backbone", sorted(folder.glob("*.safetensors")))
    return share_of_experts(open_backbone(files, config).load(torch.float32))


def plain(name: str, tensor: Tensor) -> Tensor:
    """What is usual: norms of 1, and embeddings as long as everything else."""
    return Tensor(tensor.shape, min(tensor.mean, 1), 1.0 if "embeddings" in name else tensor.spread)


def mean_hits(folder: Path, config: BackboneConfig, form: Int4 | None = None, usual: bool = False) -> float:
    """The mean of four folders, for a tiny one's share varies."""
    found = []
    for turn in range(4):
        (target := folder / str(turn)).mkdir(parents=True)
        for index, (file, tensors) in enumerate(backbone_files(config, form)):
            chosen = {name: plain(name, t) for name, t in tensors.items()} if usual else tensors
            write_tensors(target / file, chosen, torch.float32, torch.device("cpu"), 100 * turn + index)
        found.append(hits(target, config))
    return sum(found) / len(found)


def test_its_weights_send_masks_to_more_experts_than_usual_ones(tmp_path):
    config = replace(tiny().backbone, **NARROW, **MANY)
    # 64 tokens that choose 2 of 64 experts at random hit 0.87 of them.
    usual = mean_hits(tmp_path / "usual", config, usual=True)
    assert mean_hits(tmp_path / "spread", config) > max(0.5, 2 * usual)
    assert mean_hits(tmp_path / "in 4 bits", config, Int4()) > max(0.5, 2 * usual)


@pytest.mark.parametrize(("weights", "form"), [("4-bit", Int4), ("8-bit", Int8)])
def test_a_folder_in_fewer_bits_is_opened_like_a_converted_one(weights, form, tmp_path):
    """Whole banks, of the same spread as they would have in bf16."""
    backbone = replace(tiny().backbone, vocab_size=704, image_token_offset=448)
    sizes, device = replace(tiny(), backbone=backbone), torch.device("cpu")
    write_folder(tmp_path, sizes, Vision(2, 32, 2, 64, 256, 16), device, weights)
    model = LLaDAUni(tmp_path)
    bank = model.components["backbone"].load(torch.float32).layers[1].mlp.experts.gate_up
    assert type(bank.form) is form
    dense = form().dequantize(dict(bank.named_parameters()), bank.shape[-1], torch.float32)
    assert float(dense.std()) == pytest.approx(bank.shape[-1] ** -0.5, rel=0.05)
    assert abs(float(dense.mean())) < 0.05 * float(dense.std())
    drawn = model.generate("a fox", 64, 64)
    assert model.decode(drawn.tokens, Decoding(turbo=True))[0].isfinite().all()
