"""What the benchmarks share: the oracle of the tests, a table, and JSON."""

import argparse
import importlib.util
import json
import platform
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).parents[1]


def load_oracle() -> ModuleType:
    """tests/core/oracle.py: the recompute-everything form, which lives there and nowhere else, and random weights."""
    spec = importlib.util.spec_from_file_location("oracle", ROOT / "tests" / "core" / "oracle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.processor()}
        file.write_text(json.dumps({"benchmark": title, "machine": machine, "figures": figures}, indent=1))
