"""Pictures of a world, drawn once by many processes, and what is to be told of them."""

import json
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from .sizes import SEED
from .worlds import World

_POINTS = 4  # of a picture, where there is something to see


def in_processes(work: Callable[[int], Any], count: int, workers: int) -> list[Any]:
    """work(0), work(1), ... in several processes where that is worth it; what they write to must be shared.

    Raises:
        RuntimeError: a process that ended early.
    """
    if workers < 2 or count < 200:
        return [work(i) for i in range(count)]
    context = get_context("fork")  # work goes along as it is, whatever it holds
    pipes, processes = [], []
    for first in range(workers):
        ours, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=_every, args=(work, range(first, count, workers), theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    results: list[Any] = [None] * count
    for first, pipe in enumerate(pipes):
        try:
            results[first::workers] = pipe.recv()
        except EOFError:
            raise RuntimeError("a process that prepares data ended early; its error is above") from None
    for process in processes:
        process.join()
    return results


def _every(work: Callable[[int], Any], numbers: range, pipe) -> None:
    torch.set_num_threads(1)
    pipe.send([work(i) for i in numbers])


def _scene(world: World, grid: int, index: int) -> Any:
    return world.sample(Random(f"{SEED} {grid} {index}"), world.grids[grid])


def picture_pool(
    world: World, folder: Path, count: int, workers: int, full: bool, device: torch.device
) -> list[dict[str, torch.Tensor]]:
    """Pictures of a world and what is to be told of them, made once and kept in the folder of the run.

    Args:
        world: whose.
        folder: of the run.
        count: of all grids together; the first has half of them.
        workers: processes that draw.
        full: whether "painted" is wanted, which takes most of the room.
        device: where they are wanted.

    Returns:
        For each grid: "painted" uint8 [n, 32 h, 32 w, 3] (with `full`), "seen" uint8 [n, 16 h, 16 w, 3], "focus" int16
        [n, 4, 2], and `World.targets` with n before their shapes, in few bits.
    """
    place = folder / f"pool-{'painted' if full else 'seen'}-{count}"
    place.mkdir(parents=True, exist_ok=True)
    pools = []
    for number, (rows, columns) in enumerate(world.grids):
        n = max(1, count // 2 if number == 0 else count // (2 * (len(world.grids) - 1)))
        tokens = rows * columns
        shapes = {
            "seen": ((n, 16 * rows, 16 * columns, 3), "uint8"),
            "focus": ((n, _POINTS, 2), "int16"),
            "colour": ((n, tokens), "uint8"),
            "kind": ((n, tokens), "int16"),
            "quarter": ((n, tokens), "uint8"),
            "cover": ((n, tokens, 16), "float16"),
        }
        if full:
            shapes["painted"] = ((n, 32 * rows, 32 * columns, 3), "uint8")
        arrays = _kept(place, number, shapes, lambda out, number=number: _fill(world, number, out, workers))
        pools.append({name: torch.from_numpy(array).to(device) for name, array in arrays.items()})
    return pools


def _kept(place: Path, number: int, shapes: dict, fill: Callable[[dict[str, np.ndarray]], None]) -> dict:
    """Arrays in files, filled where they are not yet whole."""
    done = place / f"{number}.json"
    said = json.dumps({name: [list(shape), dtype] for name, (shape, dtype) in shapes.items()})
    if not (done.exists() and done.read_text() == said):
        arrays = {
            name: np.lib.format.open_memmap(place / f"{name}{number}.npy", "w+", dtype, shape)
            for name, (shape, dtype) in shapes.items()
        }
        fill(arrays)
        done.write_text(said)
        return arrays
    return {name: np.load(place / f"{name}{number}.npy", mmap_mode="c") for name in shapes}


def _fill(world: World, number: int, out: dict[str, np.ndarray], workers: int) -> None:
    def one(index: int) -> None:
        scene, rng = _scene(world, number, index), Random(index)
        out["seen"][index] = world.seen(scene)
        out["focus"][index] = [world.focus(scene, rng) for _ in range(_POINTS)]
        for name, value in world.targets(scene).items():
            out[name][index] = value
        if "painted" in out:
            out["painted"][index] = world.painted(scene)

    in_processes(one, len(out["seen"]), workers)
