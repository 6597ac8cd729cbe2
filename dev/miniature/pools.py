"""What is made of pictures once vision tower and VAE are trained: codes of examples, and latents with their codes."""

import json
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import vae as vae_stage
from . import vision
from .pictures import in_processes, picture_pool
from .stage import origin, trained
from .worlds import World

_CHUNK = 128  # pictures that go through a network at once
_SHARE = 6_000  # pictures that are drawn at once for their codes: about a gigabyte
_FACTORS = "latents.json"


def _shared(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array that forked processes write to."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, max(1, size)), dtype=dtype, count=int(np.prod(shape))).reshape(shape)


def codes(
    world: World,
    folder: Path,
    made: Callable[[int], Sequence[Any]],
    count: int,
    device: torch.device,
    workers: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The codes of the scenes of examples, from the vision stage of a run.

    Args:
        world: of the scenes.
        folder: of the run.
        made: the scenes of an example by its number.
        count: of examples.
        device: where the vision tower runs.
        workers: processes that draw.

    Returns:
        int16, all codes one after the other in raster order; and int64 [count], where each example's begin.
    """
    model = trained(folder, "vision", vision.VisionTrainer(world))
    if model is None:
        raise SystemExit("Train the stage vision first.")
    model = model.model.to(device)
    grids = in_processes(lambda i: [world.grids.index(scene.grid) for scene in made(i)], count, workers)
    tokens = [rows * columns for rows, columns in world.grids]
    sizes = np.array([sum(tokens[g] for g in own) for own in grids])
    starts = np.cumsum(sizes) - sizes
    flat = np.empty(int(sizes.sum()), dtype=np.int16)
    per_share = max(1, int(_SHARE * count / max(1, sum(map(len, grids)))))
    most = [
        max(sum(own.count(g) for own in grids[at : at + per_share]) for at in range(0, count, per_share))
        for g in range(len(tokens))
    ]
    room = [_shared((max(1, n), 16 * r, 16 * c, 3), "uint8") for n, (r, c) in zip(most, world.grids, strict=True)]
    for first in range(0, count, per_share):
        numbers = range(first, min(count, first + per_share))
        taken, slots, targets = [0] * len(tokens), [], [[] for _ in tokens]
        for number in numbers:
            at, own = int(starts[number]), []
            for g in grids[number]:
                own.append((g, taken[g]))
                targets[g].append(at)
                taken[g] += 1
                at += tokens[g]
            slots.append(own)

        def draw(index: int, first=first, slots=slots) -> None:
            for (g, slot), scene in zip(slots[index], made(first + index), strict=True):
                room[g][slot] = world.seen(scene)

        in_processes(draw, len(numbers), workers)
        for g, where in enumerate(targets):
            for start in range(0, len(where), _CHUNK):
                pixels = torch.from_numpy(room[g][start : min(start + _CHUNK, len(where))]).to(device)
                found = vision.codes_of(model, pixels).flatten(1).to(torch.int16).cpu().numpy()
                for at, one in zip(where[start : start + _CHUNK], found, strict=True):
                    flat[at : at + len(one)] = one
    return flat, starts


def factors_of(folder: Path) -> dict[str, float]:
    """The VAE's factors as its config.json has them; where no latents are made yet, those that change nothing."""
    if (path := folder / _FACTORS).exists():
        return json.loads(path.read_text())
    return {"scaling_factor": 1.0, "shift_factor": 0.0}


def latent_pool(world: World, folder: Path, count: int, device: torch.device, workers: int) -> dict[str, torch.Tensor]:
    """What the decoder learns from, made once and kept in the folder of the run.

    Returns:
        For each grid by number: "codes0" int16 [n, h, w], "latents0" float16 [n, 16, 4 h, 4 w] (scaled); and "scaling"
        and "shift", float32 [], the VAE's factors.
    """
    path, made_from = folder / "pool-latents.pt", f"{count} of {origin(folder, 'vae', 'vision')}"
    if path.exists():
        pool = torch.load(path, map_location="cpu", weights_only=True)
        if pool.pop("from") == made_from:
            return pool
    vae = trained(folder, "vae", vae_stage.build(world.sizes))
    tower = trained(folder, "vision", vision.VisionTrainer(world))
    if vae is None or tower is None:
        raise SystemExit("Train the stages vae and vision first.")
    vae, tower, pool = vae.to(device), tower.model.to(device), {}
    for number, pictures in enumerate(picture_pool(world, folder, count, workers, True, torch.device("cpu"))):
        found = [vision.codes_of(tower, part.to(device)).cpu() for part in pictures["seen"].split(_CHUNK)]
        pool[f"codes{number}"] = torch.cat(found).to(torch.int16)
        latents = [vae_stage.latents_of(vae, part.to(device)).cpu() for part in pictures["painted"].split(16)]
        pool[f"latents{number}"] = torch.cat(latents)
    every = torch.cat([pool[f"latents{i}"].transpose(0, 1).flatten() for i in range(len(world.grids))])
    shift, scaling = every.mean(), 1 / every.std()
    for number in range(len(world.grids)):
        pool[f"latents{number}"] = ((pool[f"latents{number}"] - shift) * scaling).half()
    pool |= {"scaling": scaling, "shift": shift}
    factors = {"scaling_factor": float(scaling), "shift_factor": float(shift)}
    (folder / _FACTORS).write_text(json.dumps(factors))
    torch.save(pool | {"from": made_from}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
    print(f"latents of {count} pictures: scaling {scaling:.4f}, shift {shift:.4f}", flush=True)
    return pool
