"""What every stage of the training shares: the loop, its log, and checkpoints that survive being killed."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from .muon import Muon, Together
from .sizes import SEED, Schedule

SAVE_EVERY = 60.0  # seconds
REPORT_EVERY = 20.0  # seconds
_WARM_UP = 100  # steps
_FALL = 0.3  # the last part of a stage, in which the learning rate falls to nothing


class Stage:
    """One part that is trained. A subclass sets `name`, `module` and `schedule` and says what a batch is.

    Batches depend on the step alone, and all chance of a step on its generator, so that a stage that was killed goes
    on as if it had not been.
    """

    name: str
    module: nn.Module
    schedule: Schedule
    busy = True  # whether batches are worth processes of their own
    autocast = True  # whether a GPU computes it in bfloat16

    def batch(self, step: int) -> dict[str, Any]:
        """The data of a step, on the CPU."""
        raise NotImplementedError

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What is to fall, and figures for the log."""
        raise NotImplementedError

    def matrices(self) -> list[nn.Parameter]:
        """What Muon trains; AdamW trains the rest."""
        return []

    def after_step(self, step: int) -> None:
        """Whatever is not done by gradients."""


@dataclass
class Budget:
    """When a stage ends: at its steps, or after so many minutes (None: no limit)."""

    steps: int
    minutes: float | None = None

    def done(self, step: int, seconds: float) -> float:
        """How much of the stage is over, 0...1."""
        by_time = 0.0 if self.minutes is None else seconds / max(60 * self.minutes, 1e-9)
        return min(1.0, max(step / self.steps, by_time))


class _Batches(Dataset):
    def __init__(self, stage: Stage):
        self.stage = stage

    def __getitem__(self, step: int) -> dict[str, Any]:
        return self.stage.batch(step)


def run(stage: Stage, folder: Path, budget: Budget, device: torch.device, workers: int = 0, more: bool = False) -> dict:
    """Train a stage until its budget is used up, from its last checkpoint if there is one.

    Args:
        stage: what to train.
        folder: of the run; the stage keeps `<name>.pt` there.
        budget: when to end.
        device: where.
        workers: processes that prepare batches.
        more: whether a stage that had used up an earlier budget goes on with this one.

    Returns:
        The final state: {"model", "optimizer", "step", "seconds", "figures", "done", "device"}.
    """
    path = folder / f"{stage.name}.pt"
    module = stage.module.to(device).train()
    optimizer = make_optimizer(stage)
    state = {"step": 0, "seconds": 0.0, "figures": {}, "done": False}
    warm = 0  # the step that the learning rate rises from
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)  # AdamW counts its steps on the CPU
        module.load_state_dict(state["model"])
        if state["optimizer"]:
            optimizer.load_state_dict(state["optimizer"])
        else:  # a run that was carried (`pieces`)
            warm = state["step"]
    step, before, began = state["step"], state["seconds"], time.monotonic()
    saved = reported = began
    figures: dict[str, float] = state["figures"]
    if state["done"] and not more:
        print(f"{stage.name}: done before ({step} steps, {before / 60:.1f} min), {figures}", flush=True)
        return state
    fraction = budget.done(step, before)
    for batch in _batches(stage, step, budget.steps, workers if stage.busy else 0):
        if fraction >= 1:
            break
        batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
        for group in optimizer.param_groups:
            group["lr"] = stage.schedule.rate * min(1.0, (step - warm + 1) / _WARM_UP, (1 - fraction) / _FALL)
        loss, shown = take_step(stage, optimizer, batch, step, device)
        shown = {name: value.detach() for name, value in shown.items()}
        step += 1
        now = time.monotonic()
        fraction = budget.done(step, before + now - began)
        if now - reported > REPORT_EVERY or step == 1 or fraction >= 1:
            reported = now
            figures = {"loss": float(loss), **{name: float(value) for name, value in shown.items()}}
            text = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            print(
                f"{stage.name}: step {step}, {(before + now - began) / 60:.1f} min, {fraction:.0%}: {text}", flush=True
            )
        if now - saved > SAVE_EVERY:
            saved = now
            save(path, module, optimizer, step, before + now - began, figures, False)
    return save(path, module, optimizer, step, before + time.monotonic() - began, figures, True)


def _batches(stage: Stage, first: int, last: int, workers: int) -> Iterator[dict[str, Any]]:
    options = {"num_workers": workers, "prefetch_factor": 4, "multiprocessing_context": "fork"} if workers else {}
    yield from DataLoader(_Batches(stage), batch_size=None, sampler=range(first, last), **options)


def make_optimizer(stage: Stage) -> Together:
    """Muon for a stage's inner matrices, AdamW for the rest; matrices decay a little, nothing else does."""
    inner, rate = stage.matrices(), stage.schedule.rate
    rest = [p for p in stage.module.parameters() if p.requires_grad and not any(p is one for one in inner)]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.01}]
    groups.append({"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0})
    fused = all(p.is_cuda for p in rest)
    adam = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), foreach=not fused, fused=fused)
    return Together(adam, Muon(inner, rate)) if inner else Together(adam)


def take_step(stage: Stage, optimizer: Together, batch: dict, step: int, device: torch.device):
    """One optimizer step; the loss and the figures of it."""
    generator = torch.Generator(device).manual_seed(SEED * 1_000_003 + step)
    with torch.autocast(device.type, torch.bfloat16, enabled=stage.autocast and device.type == "cuda"):
        loss, shown = stage.loss(batch, generator)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(stage.module.parameters(), 1.0)
    optimizer.step()
    stage.after_step(step)
    return loss.detach(), shown


def save(path: Path, module: nn.Module, optimizer, step: int, seconds: float, figures: dict, done: bool) -> dict:
    """Write a checkpoint so that a kill at any moment leaves the old one or the new one, and return it."""
    device = next(module.parameters()).device
    state = {
        "model": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "seconds": seconds,
        "figures": figures,
        "done": done,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
    }
    unfinished = path.with_suffix(".part")
    torch.save(state, unfinished)
    os.replace(unfinished, path)
    return state


def origin(folder: Path, *names: str) -> str:
    """Which state of the named stages the folder holds, so that what was made of another is made anew."""
    steps = []
    for name in names:
        path = folder / f"{name}.pt"
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True) if path.exists() else {"step": 0}
        steps.append(f"{name} {state['step']}")
    return ", ".join(steps)


def spent(folder: Path, name: str) -> float:
    """Minutes that a stage has trained so far."""
    path = folder / f"{name}.pt"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["seconds"] / 60 if path.exists() else 0.0


def trained(folder: Path, name: str, module: nn.Module) -> nn.Module | None:
    """A module with what stage `name` has learnt so far, in eval mode; None where it has not begun."""
    path = folder / f"{name}.pt"
    if not path.exists():
        return None
    module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model"])
    return module.eval().requires_grad_(False)
