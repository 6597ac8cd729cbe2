"""What is made once vision tower and VAE are trained: the code of each look, and latents of pictures with codes."""

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import vae as vae_stage
from . import vision
from .pictures import picture_pool
from .sizes import SEED
from .stage import origin, trained
from .worlds import World

_CHUNK = 128  # pictures that go through a network at once
_CHECKED = 4  # pictures of each size that a table of codes is compared with
_FACTORS = "latents.json"


def code_table(world: World, folder: Path) -> torch.Tensor:
    """The code of each look, int64 [tints * kinds * quarters]: the nearest to the mean feature of all that look so.

    The vision tower is trained to give a look one code, wherever it lies. How often it does is measured on a few
    pictures and printed; a look that the stage never saw has code 0.

    Args:
        world: of the looks.
        folder: of the run, whose vision stage is trained.
    """
    trainer = trained(folder, "vision", vision.VisionTrainer(world))
    if trainer is None:
        raise SystemExit("Train the stage vision first.")
    codebook = F.normalize(trainer.model.vqmodel.quantize.embedding.weight, dim=-1)
    table = (F.normalize(trainer.looks, dim=-1) @ codebook.T).argmax(-1)
    rng, same = Random(SEED), []
    for grid in world.grids:
        scenes = [world.sample(rng, grid) for _ in range(_CHECKED)]
        found = vision.codes_of(trainer.model, torch.from_numpy(np.stack([world.seen(scene) for scene in scenes])))
        told = torch.stack([codes_by_look(world, table, scene) for scene in scenes])
        same.append((found == told).flatten())
    share, count = torch.cat(same).float().mean(), sum(map(len, same))
    print(f"codes by look: {share:.2%} of {count:,} tokens are as the vision tower has them", flush=True)
    return table


def codes_by_look(world: World, table: torch.Tensor, scene: Any) -> torch.Tensor:
    """The codes of a scene, int64 [h, w], without a picture: `code_table` at each token's look."""
    told = world.targets(scene)
    looks = (told["colour"] * world.kinds + told["kind"]) * world.quarters + told["quarter"]
    return table[torch.from_numpy(looks)].view(scene.grid)


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
