"""What the training asks of a world; and the worlds by name."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .sizes import Sizes

Grid = tuple[int, int]


@dataclass(frozen=True)
class World:
    """A drawn world, as the training sees it. Scenes are its own; they have `grid`, (rows, columns) of tokens.

    Attributes:
        name: of it.
        sizes: of the networks that learn it.
        grids: sizes of its pictures; the first is the usual one, which a plan announces.
        sample: a random training scene of a grid.
        painted: a scene's picture, uint8 [height, width, 3].
        seen: the same at half the size, as the engine's preprocessing leaves it.
        focus: somewhere in a picture where there is something to see, (x, y) in pixels.
        targets: what each token looks like: colour, kind and quarter int64 [h·w], cover float32 [h·w, 16].
        tints, kinds, quarters: how many of them there are.
        grounds: how many of the kinds, the first ones, are ground.
        shares: how often each task is trained.
        example: a random training example of a task.
        drill: a question about pictures that a function gives.
        shown: the grids of pictures to be edited or asked about.
        apart: a pattern of what stands alone as a token of text ("" for nothing).
        tokenizer: a file of one that was learnt earlier; None has it learnt from the texts of today.
    """

    name: str
    sizes: Sizes
    grids: tuple[Grid, ...]
    sample: Callable[[random.Random, Grid], Any]
    painted: Callable[[Any], np.ndarray]
    seen: Callable[[Any], np.ndarray]
    focus: Callable[[Any, random.Random], tuple[int, int]]
    targets: Callable[[Any], dict[str, np.ndarray]]
    tints: int
    kinds: int
    quarters: int
    grounds: int
    shares: dict[str, float]
    example: Callable[[random.Random, str | None], Any]
    drill: Callable[[random.Random, Callable[[], Any]], Any]
    shown: tuple[Grid, ...]
    apart: str = ""
    tokenizer: Path | None = None

    def turn(self, step: int) -> int:
        """Which of the grids a step is about: the first in every other one."""
        others = len(self.grids) - 1
        return 0 if step % 2 == 0 or not others else 1 + step // 2 % others


def shapes() -> World:
    """The first world: one to three coloured shapes on plain backgrounds."""
    from dataclasses import replace

    from . import examples, looks, sizes, world

    def sample(rng: random.Random, grid: Grid):
        return replace(world.sample_scene(rng), grid=grid)

    def focus(scene, rng: random.Random) -> tuple[int, int]:
        return world.centre_of(rng.choice(scene.things).place, scene.grid)

    return World(
        name="shapes",
        sizes=sizes.SHAPES,
        grids=world.GRIDS,
        sample=sample,
        painted=lambda scene: np.asarray(world.render(scene)),
        seen=lambda scene: np.asarray(world.view(scene)),
        focus=focus,
        targets=looks.targets,
        tints=len(world.COLOURS),
        kinds=1 + len(looks.KINDS),
        quarters=4,
        grounds=1,
        shares=examples.SHARES,
        example=lambda rng, task: examples.example(rng, task=task),
        drill=examples.drill,
        shown=world.GRIDS,
    )


def signs() -> World:
    """The harder world: up to six objects, words, scenes behind."""
    from .signs import drawing, examples, looks, sizes, world

    def sample(rng: random.Random, grid: Grid):
        return world.sample_scene(rng, grids=(grid,))

    return World(
        name="signs",
        sizes=sizes.SIGNS,
        grids=world.GRIDS,
        sample=sample,
        painted=drawing.painted,
        seen=drawing.seen,
        focus=drawing.focus,
        targets=looks.targets,
        tints=len(looks.TINTS),
        kinds=len(looks.patterns()[0]),
        quarters=1,
        grounds=looks.GROUNDS,
        shares=examples.SHARES,
        example=lambda rng, task: examples.example(rng, task=task),
        drill=examples.drill,
        shown=world.SHOWN,
        apart="[A-Z0-9]",
        tokenizer=Path(__file__).parent / "signs" / "tokenizer.json",
    )


WORLDS = {"shapes": shapes, "signs": signs}
