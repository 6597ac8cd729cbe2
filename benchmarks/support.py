"""What the benchmarks share: the oracle of the tests, a table, and JSON."""

import argparse
import importlib.util
import json
import platform
from pathlib import Path
from types import ModuleType

import torch

from llada_core.backbone.config import BackboneConfig

ROOT = Path(__file__).parents[1]


def load_oracle() -> ModuleType:
    """tests/core/oracle.py: the recompute-everything form, which lives there and nowhere else, and random weights."""
    spec = importlib.util.spec_from_file_location("oracle", ROOT / "tests" / "core" / "oracle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def released_backbone() -> BackboneConfig:
    """The released sizes of the backbone (docs/model.md, Backbone)."""
    return BackboneConfig(
        vocab_size=173_568,
        image_token_offset=157_184,
        hidden_size=2048,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=5120,
        moe_intermediate_size=512,
        num_experts=256,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        rope_theta=600_000,
        max_position_embeddings=16_384,
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option --json."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")


def show(title: str, figures: dict[str, object], file: Path | None) -> None:
    """Print figures as a table; write them, with the machine they were taken on, where `file` says."""
    print(title)
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"  {name:<{width}}  {f'{value:,.2f}' if isinstance(value, float) else value}")
    if file:
        write_figures(title, figures, file)


def write_figures(title: str, figures: dict[str, object], file: Path) -> None:
    """Write figures as JSON, with the machine they were taken on."""
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.processor()}
    file.write_text(json.dumps({"benchmark": title, "machine": machine, "figures": figures}, indent=1))
