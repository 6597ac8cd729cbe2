"""Fixtures of the engine's tests. Test files are loaded one by one, so whatever they share is handed out here."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llada_core.backbone import cuda_graphs, runner
from llada_core.backbone.cuda_graphs import CUDAGraphRunner, GraphStore
from llada_core.engine import LLaDAUni
from llada_core.sampling import block_diffusion
from llada_core.sampling.batch import Batch, Sample
from llada_core.vocabulary import Vocabulary


@pytest.fixture(scope="session")
def oracle():
    """The module oracle.py: the recompute-everything form of block diffusion."""
    spec = importlib.util.spec_from_file_location("oracle", Path(__file__).with_name("oracle.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny(oracle):
    """A small random backbone; 95 is its mask, 96 its first image id."""
    return oracle.tiny_backbone(seed=1)


@pytest.fixture(scope="session")
def model(golden_checkpoint) -> LLaDAUni:
    """The golden checkpoint, opened once. Tests may use it, not change it."""
    return LLaDAUni(golden_checkpoint)


@pytest.fixture(scope="session")
def golden_backbone(model):
    """The golden checkpoint's backbone with its weights."""
    return model._place("backbone").module


@pytest.fixture(scope="session")
def vocabulary(model) -> Vocabulary:
    """The golden checkpoint's vocabulary."""
    return model.vocabulary


@dataclass
class Generated:
    """What one sample gave, and what it was computed with."""

    runner: runner.CachedRunner
    batch: Batch
    output: block_diffusion.Output | None


@pytest.fixture(scope="session")
def generate_one() -> Callable[..., Generated]:
    """generate_one(backbone, branches, count, config): one sample of the tiny backbone; 95 is its mask.

    on_round: called with what is generated so far, the index of the block and the rounds done in it.
    """

    def generate_one(
        backbone, branches, count, config, *, seed=0, mask=95, on_round=None, graphs=False, **options
    ) -> Generated:
        sample = Sample(branches, [mask] * count, torch.Generator().manual_seed(seed))
        kept = "store" in options
        if graphs:
            options["store"] = GraphStore()
        running, batch = block_diffusion.prepare(backbone, [sample], config, mask, **options)
        generated = Generated(running, batch, None)
        try:
            (generated.output,) = block_diffusion.generate(
                running, batch, config, on_round and partial(on_round, generated)
            )
        except BaseException:
            running.close()
            raise
        if kept:
            running.finish()
        else:
            running.close()
        return generated

    return generate_one


@pytest.fixture
def fixed_shapes(monkeypatch) -> None:
    """Generations that may use graphs run rounds in the fixed shapes of graphs, kernel by kernel, on any device."""
    monkeypatch.setattr(runner, "capturable_sizes", lambda backbone, attend, device, rows, sizes: sizes)
    monkeypatch.setattr(runner, "CUDAGraphRunner", partial(CUDAGraphRunner, capture=False))


class StandIn:
    """A graph that records its life and computes when it is replayed."""

    def __init__(self, fixed, events):
        self.replay = lambda: events.append("replay") or fixed.compute()
        self.reset = lambda: events.append("reset")


@pytest.fixture
def events(monkeypatch, fixed_shapes) -> list[str]:
    """What happens to graphs where captures are stand-ins."""
    events = []

    def capture(self, fixed):
        events.append("capture")
        fixed.graph = StandIn(fixed, events)
        return fixed.graph

    def warm_up(self, fixed):
        events.append("warm_up")
        fixed.compute()
        fixed.warmed_up = True

    monkeypatch.setattr(runner, "CUDAGraphRunner", CUDAGraphRunner)
    monkeypatch.setattr(CUDAGraphRunner, "_warm_up", warm_up)
    monkeypatch.setattr(CUDAGraphRunner, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(cuda_graphs, "_free_bytes", lambda device: cuda_graphs.SPARE)
    return events


@pytest.fixture
def rewrite() -> Callable:
    """rewrite(folder, change): pass all backbone tensors of a checkpoint through `change` into one unindexed file."""

    def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
        tensors = {}
        for path in sorted(folder.glob("model*.safetensors")):
            tensors |= load_file(path)
            path.unlink()
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        save_file({key: value.contiguous() for key, value in change(tensors).items()}, folder / "model.safetensors")
        return folder

    return rewrite


@pytest.fixture
def edit_json() -> Callable:
    """edit_json(path, change): pass a JSON file's value through `change`."""

    def edit(path: Path, change: Callable) -> None:
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return edit


@pytest.fixture(scope="session")
def stacked() -> Callable:
    """stacked(tensors, suffix=""): each expert bank of a backbone's tensors as one tensor [experts, out, in]."""

    def stack(tensors: dict[str, torch.Tensor], suffix: str = "") -> dict[str, torch.Tensor]:
        rest = {key: value for key, value in tensors.items() if ".mlp.experts." not in key}
        banks: dict[str, dict[int, torch.Tensor]] = {}
        for key, value in tensors.items():
            if ".mlp.experts." in key:
                stem, _, tail = key.partition(".experts.")
                expert, kind, leaf = tail.split(".")
                end = suffix if leaf == "weight" else f".{leaf}"
                banks.setdefault(f"{stem}.experts.{kind}{end}", {})[int(expert)] = value
        return rest | {key: torch.stack([bank[e] for e in range(len(bank))]) for key, bank in banks.items()}

    return stack
