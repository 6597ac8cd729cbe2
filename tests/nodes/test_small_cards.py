"""benchmarks/small_cards.py on small sizes: the same path as on a GPU, without one. Needs a real ComfyUI."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.fullsize import tiny
from benchmarks.random_folder import Tensor, backbone_files, write_tensors
from llada_core.backbone.cache import PrefixCache
from llada_core.backbone.config import BackboneConfig
from llada_core.backbone.experts import Router
from llada_core.backbone.keys import open_backbone
from llada_core.checkpoint.weights import TensorFiles

ROOT = Path(__file__).parents[2]
NARROW = {"hidden_size": 256, "moe_intermediate_size": 8, "intermediate_size": 64, "num_hidden_layers": 4}
MANY = {"num_experts": 64, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "head_dim": 64, "rope_theta": 6e5}


def test_the_program_runs(comfyui, tmp_path):
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.small_cards", "--tiny", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(file.read_text())["figures"]
    assert figures["second picture, s"] > 0
    assert figures["question, s"] > 0
    assert figures["edit, tokens alone, s"] > 0
    assert figures["with mapped file pages, GB"] >= figures["server's main memory, GB"] > 0


def hits(folder: Path, config: BackboneConfig) -> float:
    """The share of the experts that 32 mask tokens after a text are sent to, averaged over layers."""
    files = TensorFiles("backbone", sorted(folder.glob("*.safetensors")))
    backbone = open_backbone(files, config).load(torch.float32)
    chosen = []
    for router in (module for module in backbone.modules() if isinstance(module, Router)):
        router.register_forward_hook(lambda module, given, out: chosen.append(out[0][-32:].unique().numel()))
    ids = torch.tensor([[*range(3, 63), *[2] * 32]])
    context = PrefixCache(config, 1, 92, "cpu", torch.float32)
    backbone(ids, torch.arange(92)[None], context, 0, None)
    return sum(chosen) / len(chosen) / config.num_experts


def plain(name: str, tensor: Tensor) -> Tensor:
    """What is usual: norms of 1, and embeddings as long as everything else."""
    return Tensor(tensor.shape, min(tensor.mean, 1), 1.0 if "embeddings" in name else tensor.spread)


def test_its_weights_send_masks_to_more_experts_than_usual_ones(tmp_path):
    config = replace(tiny().backbone, **NARROW, **MANY)
    for folder in ("spread", "usual"):
        (tmp_path / folder).mkdir()
        for seed, (file, tensors) in enumerate(backbone_files(config)):
            chosen = tensors if folder == "spread" else {name: plain(name, t) for name, t in tensors.items()}
            write_tensors(tmp_path / folder / file, chosen, torch.float32, torch.device("cpu"), seed)
    # 32 tokens that choose 2 of 64 experts at random hit 0.64 of them.
    assert hits(tmp_path / "spread", config) > max(0.4, 2 * hits(tmp_path / "usual", config))
