"""Pictures prepared once for the stages that look at the same ones many times: their codes and their VAE latents."""

from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np
import torch

from . import vae as vae_stage
from . import vision
from .sizes import SEED
from .stage import origin, trained
from .world import GRIDS, Scene, render, sample_scene, view

_CHUNK = 128  # pictures that go through a network at once
_SHARE = 10_000  # pictures that are drawn at once: half a gigabyte


def pictures(scenes: Sequence[Scene], draw, workers: int) -> list[np.ndarray]:
    """Draw scenes, in several processes where that is worth it: uint8 [height, width, 3] each."""
    if workers < 2 or len(scenes) < 1000:
        return [np.asarray(draw(scene)) for scene in scenes]
    with get_context("fork").Pool(workers) as pool:
        return pool.map(_Drawn(draw), scenes, chunksize=256)


class _Drawn:
    def __init__(self, draw):
        self.draw = draw

    def __call__(self, scene: Scene) -> np.ndarray:
        return np.asarray(self.draw(scene))


def codes(folder: Path, scenes: Sequence[Scene], device: torch.device, workers: int) -> list[torch.Tensor]:
    """The codes of scenes, int16 [h, w] each on the CPU, from the vision stage of a run."""
    model = trained(folder, "vision", vision.VisionTrainer())
    if model is None:
        raise SystemExit("Train the stage vision first.")
    model = model.model.to(device)
    found: list[torch.Tensor] = [torch.empty(0)] * len(scenes)
    for grid in GRIDS:
        here = [i for i, scene in enumerate(scenes) if scene.grid == grid]
        # One tensor for all: what is kept picture by picture leaves the memory in pieces, gigabytes of them.
        made = torch.empty(len(here), *grid, dtype=torch.int16)
        for at in range(0, len(here), _SHARE):
            chosen = here[at : at + _SHARE]
            drawn = pictures([scenes[i] for i in chosen], view, workers)
            for start in range(0, len(chosen), _CHUNK):
                pixels = torch.from_numpy(np.stack(drawn[start : start + _CHUNK])).to(device)
                made[at + start : at + start + len(pixels)] = vision.codes_of(model, pixels).cpu()
        for i, grid_codes in zip(here, made, strict=True):
            found[i] = grid_codes
    return found


def latent_pool(folder: Path, count: int, device: torch.device, workers: int) -> dict[str, torch.Tensor]:
    """What the decoder learns from, made once and kept in the folder of the run.

    Returns:
        For each of GRIDS by index: "codes0" int16 [n, h, w], "latents0" float16 [n, 16, 4 h, 4 w] (scaled); and
        "scaling" and "shift", float32 [], the VAE's factors.
    """
    path, made_from = folder / "pool-latents.pt", f"{count} of {origin(folder, 'vae', 'vision')}"
    if path.exists():
        pool = torch.load(path, map_location="cpu", weights_only=True)
        if pool.pop("from") == made_from:
            return pool
    vae = trained(folder, "vae", vae_stage.build())
    if vae is None:
        raise SystemExit("Train the stage vae first.")
    vae = vae.to(device)
    rng = Random(SEED * 31)
    pool = {}
    for index, grid in enumerate(GRIDS):
        scenes = [sample_scene(rng) for _ in range(count * (2 - index) // 3)]
        scenes = [Scene(scene.things, scene.background, grid) for scene in scenes]
        pool[f"codes{index}"] = torch.stack(codes(folder, scenes, device, workers))
        latents = []
        for at in range(0, len(scenes), 2048):
            drawn = pictures(scenes[at : at + 2048], render, workers)
            for start in range(0, len(drawn), 16):
                pixels = torch.from_numpy(np.stack(drawn[start : start + 16])).to(device)
                latents.append(vae_stage.latents_of(vae, pixels).cpu())
        pool[f"latents{index}"] = torch.cat(latents)
    every = torch.cat([pool[f"latents{i}"].transpose(0, 1).flatten() for i in range(len(GRIDS))])
    shift, scaling = every.mean(), 1 / every.std()
    for index in range(len(GRIDS)):
        pool[f"latents{index}"] = ((pool[f"latents{index}"] - shift) * scaling).half()
    pool |= {"scaling": scaling, "shift": shift}
    torch.save(pool | {"from": made_from}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
    print(f"latents of {count} pictures: scaling {scaling:.4f}, shift {shift:.4f}", flush=True)
    return pool
