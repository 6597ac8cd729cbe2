"""How right masked edits, outpainting and variations are on the miniature, and what they take.

Held-out prompts, judged by pixels as in `quality`. *Kept* is the share of pictures whose tokens outside the mask are
all what they were (of variations the share of tokens that stayed), in per cent; *rounds* and *seconds* are of a
picture, on this machine. With --processes prompts are shared out among as many, and these among the GPUs that there
are; their seconds are of work side by side. With --seconds what has come by then is what counts: *prompts* says of how
many.

    python -m benchmarks.masks CHECKPOINT [--world signs] [--count 300] [--device cpu] [--json FILE]
    python -m benchmarks.masks CHECKPOINT --device cuda --processes 16
"""

import argparse
import multiprocessing
import queue
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dev.miniature import checker, examples
from dev.miniature.examples import Example
from dev.miniature.signs import checker as signs_checker
from dev.miniature.signs import examples as signs_examples
from dev.miniature.worlds import WORLDS
from llada_core.engine import Generation, LLaDAUni
from llada_core.image_tokens import ImageTokens
from llada_core.options import Decoding
from llada_core.placement import OneDevice
from llada_core.token_edits import crop, pad, touched_cells

from .support import add_json, show

AROUND = 17  # pixels, odd: a mask is what an edit changes and half as many around it
KNOWN = 0.625  # of a picture's width is known to outpainting
BATCH = 10  # pictures at once
PARTS = 3  # of what a process has of each row, where there are several
# What draws an example, and what looks at a picture, in each world.
OF_WORLD = {
    "shapes": (examples.example, checker.look),
    "signs": (signs_examples.example, signs_checker.look),
}


class Masks:
    """The measurements on one checkpoint.

    Args:
        model: the checkpoint.
        count: prompts a row.
        world: that it has learnt.
        share: which of how many shares of the prompts.
    """

    def __init__(self, model: LLaDAUni, count: int, world: str = "shapes", share: tuple[int, int] = (0, 1)):
        self.model, self.count, self.world, self.share = model, count, WORLDS[world](), share
        self._example, self._look = OF_WORLD[world]

    def examples(self, task: str, references: int | None = None) -> list[Example]:
        """The share of the held-out examples of a task, always the same ones, those of `quality`; or of those with so
        many references."""
        rng = random.Random(f"{task} 0")
        count = self.count if references is None else 2 * self.count
        made = [self._example(rng, "held-out", task) for _ in range(count)]
        fit = [one for one in made if references is None or len(one.references) == references]
        index, shares = self.share
        return fit[: self.count][index::shares]

    def encode(self, scene: Any) -> ImageTokens:
        """The picture of a scene as the tokens that draw it."""
        pixels = torch.from_numpy(self.world.painted(scene).copy())[None] / 255
        # Half the size each way, as a token is 16 pixels of what is seen, and 32 of what is drawn.
        return self.model.encode(pixels, "understand", pixels=pixels.shape[1] * pixels.shape[2] // 4)

    def judged(
        self,
        drawn: Sequence[Generation],
        wanted: Sequence[Any],
        before: Sequence[torch.Tensor],
        cells: Sequence[torch.Tensor],
    ) -> dict[str, float]:
        """The figures of a row: what is right, what was kept, rounds and seconds."""
        right, kept = [], []
        for one, scene, start, where in zip(drawn, wanted, before, cells, strict=True):
            (picture,) = self.model.decode(one.tokens, Decoding())
            right.append(self._look(picture.numpy()).shows(scene))
            kept.append(torch.equal(one.tokens.grids[0][~where], start[~where]))
        return {
            "prompts": len(right),
            "right": 100 * sum(right) / len(right),
            "kept": 100 * sum(kept) / len(kept),
            "rounds": sum(one.usage.rounds for one in drawn) / len(drawn),
            "seconds": sum(one.usage.seconds for one in drawn) / len(drawn),
        }

    def in_batches(self, work: Callable[[slice], list[Generation]], count: int) -> list[Generation]:
        """All results, a batch at a time."""
        return [one for at in range(0, count, BATCH) for one in work(slice(at, at + BATCH))]

    def edits(self) -> dict[str, dict[str, float]]:
        """Edits of one picture: the whole drawn, against what changes and a little around it."""
        made = self.examples("edit", 1)
        scenes, wanted = [one.references[0] for one in made], [one.frames[-1][1] for one in made]
        tokens = [self.encode(scene) for scene in scenes]
        masks = [self.changed(one) for one in made]
        cells = [touched_cells(mask, *of.sizes[0]) for mask, of in zip(masks, tokens, strict=True)]
        before, prompts = [of.grids[0] for of in tokens], [one.instruction for one in made]

        def edit(mask: bool) -> dict[str, float]:
            def work(at: slice) -> list[Generation]:
                given = {"mask": masks[at]} if mask else {}
                return self.model.generate(prompts[at], references=tokens[at], **given)

            return self.judged(self.in_batches(work, len(made)), wanted, before, cells)

        share = sum(of.float().mean().item() for of in cells) / len(cells)
        return {
            "edit, all drawn": edit(False),
            "edit, masked": edit(True) | {"cells": 100 * share},
        }

    def outpaint(self) -> dict[str, dict[str, float]]:
        """Pictures of which the left is known; the prompt describes the whole."""
        made = self.examples("draw")
        scenes = [one.frames[-1][1] for one in made]
        whole = [self.encode(scene) for scene in scenes]
        padded = []
        for of in whole:
            height, width = (32 * side for side in of.sizes[0])
            known = int(KNOWN * width) // 32 * 32
            padded.append(pad(crop(of, 0, 0, known, height), 0, 0, width - known, 0))
        starts, masks = [start for start, _ in padded], [mask for _, mask in padded]
        cells = [touched_cells(mask, *of.sizes[0]) for mask, of in zip(masks, whole, strict=True)]
        before, prompts = [of.grids[0] for of in starts], [one.instruction for one in made]

        def draw(mask: bool) -> dict[str, float]:
            def work(at: slice) -> list[Generation]:
                if mask:
                    return self.model.generate(prompts[at], tokens=starts[at], mask=masks[at])
                sizes = [of.sizes[0] for of in whole[at]]
                return self.model.generate(prompts[at], [32 * h for h, _ in sizes], [32 * w for _, w in sizes])

            return self.judged(self.in_batches(work, len(made)), scenes, before, cells)

        return {
            "draw, nothing known": draw(False),
            "outpaint, a prompt of the whole": draw(True),
        }

    def variations(self) -> dict[str, dict[str, float]]:
        """Variations of true pictures with their prompts, by strength and choice."""
        made = self.examples("draw")
        scenes, rows = [one.frames[-1][1] for one in made], {}
        tokens = [self.encode(scene) for scene in scenes]
        for strength in (0.3, 0.7):
            for least_certain in (False, True):
                drawn = [
                    self.model.vary(of, one.instruction, strength, seed=at, least_certain=least_certain)[0]
                    for at, (of, one) in enumerate(zip(tokens, made, strict=True))
                ]
                changed = [of.grids[0] != one.tokens.grids[0] for of, one in zip(tokens, drawn, strict=True)]
                row = self.judged(drawn, scenes, [of.grids[0] for of in tokens], changed)
                row["kept"] = 100 * sum(1 - where.float().mean().item() for where in changed) / len(changed)
                choice = "least certain" if least_certain else "by seed"
                rows[f"vary {strength:.0%}, {choice}".replace("%", " %")] = row
        return rows

    def changed(self, made: Example) -> torch.Tensor:
        """The mask of an edit: the pixels that differ between the two true pictures, and some around them."""
        pictures = [self.world.painted(scene).astype(np.int16) for scene in (made.references[0], made.frames[-1][1])]
        differs = torch.from_numpy((pictures[0] != pictures[1]).any(-1)).float()
        return F.max_pool2d(differs[None], AROUND, 1, AROUND // 2)[0]


Rows = dict[str, dict[str, float]]
WHAT = ("edits", "outpaint", "variations")


def measured(options: argparse.Namespace, names: Sequence[str], index: int, parts: int) -> Iterator[Rows]:
    """The rows of each kind of measurement, of one process's part of the prompts, in so many parts."""
    torch.set_num_threads(max(1, torch.get_num_threads() // options.processes))
    gpus = torch.cuda.device_count() if options.device == "cuda" else 0
    model = LLaDAUni(options.checkpoint, OneDevice(f"cuda:{index % gpus}" if gpus > 1 else options.device))
    for name in names:
        for part in range(parts):
            share = index + part * options.processes, parts * options.processes
            yield getattr(Masks(model, options.count, options.world, share), name)()


def side_by_side(options: argparse.Namespace, names: Sequence[str]) -> Iterator[Rows]:
    """The rows of all processes as they come, until the time is up.

    Raises:
        RuntimeError: a process ended before it was done.
    """
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    workers = [
        context.Process(target=_send, args=(found, options, names, index), daemon=True)
        for index in range(options.processes)
    ]
    began, left = time.monotonic(), PARTS * len(names) * options.processes
    for worker in workers:
        worker.start()
    while left and not (options.seconds and time.monotonic() - began > options.seconds):
        try:
            yield found.get(timeout=0.5)
            left -= 1
        except queue.Empty:
            if any(worker.exitcode for worker in workers):
                raise RuntimeError("a process ended before it was done") from None
    for worker in workers:
        worker.terminate()


def _send(found: multiprocessing.Queue, options: argparse.Namespace, names: Sequence[str], index: int) -> None:
    for rows in measured(options, names, index, PARTS):
        found.put(rows)


def merged(each: Sequence[dict[str, float]]) -> dict[str, float]:
    """The figures of a row, of those of its shares."""
    prompts = sum(one["prompts"] for one in each)
    means = {name: sum(one["prompts"] * one[name] for one in each) / prompts for name in each[0]}
    return means | {"prompts": prompts}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--world", choices=WORLDS, default="shapes", help="that the checkpoint has learnt")
    parser.add_argument("--count", type=int, default=300, help="prompts a row")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="only edits, outpaint or variations")
    parser.add_argument("--processes", type=int, default=1, help="that share the prompts")
    parser.add_argument("--seconds", type=float, default=0.0, help="of several processes, as long as there is time")
    add_json(parser)
    options = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {}
    names = [name for name in WHAT if name.startswith(options.only)]
    alone = options.processes == 1
    for found in measured(options, names, 0, 1) if alone else side_by_side(options, names):
        for row, values in found.items():
            rows.setdefault(row, []).append(values)
    figures: dict[str, object] = {}
    print("| held-out prompts | right | kept | rounds | seconds | |\n|---|---|---|---|---|---|")
    for row, each in rows.items():
        of = merged(each)
        cells = f" ({of.pop('cells'):.0f} % of the cells)" if "cells" in of else ""
        prompts = of.pop("prompts")
        print(f"| {row}{cells} | " + " | ".join(f"{value:.2f}" for value in of.values()) + f" | {prompts} prompts |")
        figures |= {f"{row}{cells}: {key}": value for key, value in of.items()} | {f"{row}{cells}: prompts": prompts}
    show("Masks on the miniature", figures, options.json)


if __name__ == "__main__":
    main()
