"""The prompts of handwritten.txt with the scenes they mean."""

from pathlib import Path

from ..examples import Example
from .texts import read_scene
from .world import GRIDS, problem


def examples() -> list[Example]:
    """All of them, as drawings.

    Raises:
        ValueError: a line whose scene cannot be read, or is none of this world.
    """
    made = []
    for line in (Path(__file__).parent / "handwritten.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        prompt, meant = line.split(" => ")
        scene = read_scene(meant, GRIDS[0])
        wrong = "it cannot be read" if scene is None else problem(scene)
        if scene is None or wrong:
            raise ValueError(f"{line!r}: {wrong}")
        made.append(Example("draw", "", prompt, (), (("", scene),)))
    return made
