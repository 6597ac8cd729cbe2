"""Examples of every task about this world, for the trainer and for the benchmark."""

import random
from collections.abc import Callable

from ..examples import Example
from . import chinese, edits, plans, questions, stories
from .texts import caption, told
from .wording import Wording
from .world import GRIDS, SHOWN, Scene, belongs, sample_scene

SHARES = {"draw": 0.13, "think": 0.33, "understand": 0.25, "edit": 0.26, "story": 0.03}
TASKS = tuple(SHARES)
SPLITS = ("train", "held-out", "combination", "wording")
# Which questions training asks; the rest is drawn evenly.
DRILL = {"which": 0.24, "of two": 0.1, "read": 0.08, "count": 0.1, "where": 0.08, "colour": 0.06, "describe": 0.05}
PAIRED = ("which", "of two")
_CHINESE = 0.12  # of the prompts
_PLANNED = 0.8  # of the examples with thinking need it
_GUESSED = 0.02  # of the drawings without thinking would need it


def example(rng: random.Random, split: str = "train", task: str | None = None, kind: str | None = None) -> Example:
    """A random example of a task (None draws it by SHARES).

    Args:
        rng: the only source of chance.
        split: "train", where every scene is a training scene; "held-out" and "combination", where the scene to be
            drawn, or asked about, is of that split; "wording", held out by content and in forms never trained.
        task: one of TASKS.
        kind: of edit, question, plan or story; None draws it. For a drawing, "plan" needs thinking.
    """
    task = task or rng.choices(tuple(SHARES), SHARES.values())[0]
    wanted = "held-out" if split == "wording" else split
    w = Wording(rng, split == "wording")
    while True:
        made = _MAKERS[task](w, wanted, kind)
        judged = made and (made.scenes if split == "train" else made.scenes[-1:])
        if made and all(belongs(scene, wanted) for scene in judged):
            return made


def _scene(w: Wording, split: str, grids=GRIDS) -> Scene:
    return sample_scene(w.rng, split=split, grids=grids)


def _prompt(scene: Scene, w: Wording) -> str:
    return chinese.caption(scene, w.rng) if not w.new and w.often(_CHINESE) else caption(scene, w)


def _draw(w: Wording, split: str, kind: str | None) -> Example:
    if kind == "plan" or (kind is None and split == "train" and w.often(_GUESSED)):
        which = w.rng.choice(plans.KINDS)
        prompt, _, scene = plans.planned(w, which, w.rng.choice(GRIDS))
        return Example("draw", which, prompt, (), (("", scene),))
    scene = _scene(w, split)
    return Example("draw", "", _prompt(scene, w), (), (("", scene),))


def _think(w: Wording, split: str, kind: str | None) -> Example:
    if kind in plans.KINDS or (kind is None and w.often(_PLANNED)):
        kind = kind or w.rng.choice(plans.KINDS)
        prompt, why, scene = plans.planned(w, kind, w.rng.choice(GRIDS))
        return Example("think", kind, prompt, (), ((plans.thought(why, scene), scene),))
    scene = _scene(w, split)
    return Example("think", "", _prompt(scene, w), (), ((told(scene), scene),))


def _understand(w: Wording, split: str, kind: str | None) -> Example | None:
    kind = kind or (w.rng.choice(questions.KINDS) if w.often(0.8) else w.rng.choice(PAIRED))
    return _ask(tuple(_scene(w, split, SHOWN) for _ in range(2 if kind in PAIRED else 1)), w, kind)


def _ask(scenes: tuple[Scene, ...], w: Wording, kind: str) -> Example | None:
    asked: questions.Asked
    if kind == "which":
        asked = questions.which_question(*scenes, w)
    elif kind == "of two":
        asked = questions.of_two_question(*scenes, w)
    else:
        asked = questions.question(*scenes, w, kind)
    return asked and Example("understand", kind, asked[0], scenes, ((asked[1], None),))


def drill(rng: random.Random, scene: Callable[[], Scene]) -> Example:
    """A question about pictures that `scene` gives, its kind drawn by DRILL."""
    w = Wording(rng)
    rest = [kind for kind in questions.KINDS if kind not in DRILL]
    while True:
        (kind,) = rng.choices((*DRILL, ""), (*DRILL.values(), 1 - sum(DRILL.values())))
        kind = kind or rng.choice(rest)
        if made := _ask(tuple(scene() for _ in range(2 if kind in PAIRED else 1)), w, kind):
            return made


def _edit(w: Wording, split: str, kind: str | None) -> Example | None:
    return edit(_scene(w, split if split == "train" else "", SHOWN), w, kind or w.rng.choice(edits.KINDS))


def edit(scene: Scene, w: Wording, kind: str) -> Example | None:
    """An edit of a kind; None where the scene does not allow it."""
    if kind == "transfer":
        if made := edits.transfer(scene, w):
            words, second, after = made
            return Example("edit", kind, words, (scene, second), (("", after),))
        return None
    changed = edits.several(scene, w) if kind == "several" else edits.change(scene, w, kind)
    return changed and Example("edit", kind, changed[0], (scene,), (("", changed[1]),))


def _story(w: Wording, split: str, kind: str | None) -> Example:
    kind = kind or w.rng.choice(stories.KINDS)
    words, frames = stories.story(w, kind, split if split == "train" else None)
    return Example("story", kind, words, (), (*frames, (stories.ENDING, None)))


_MAKERS = {"draw": _draw, "think": _think, "understand": _understand, "edit": _edit, "story": _story}
