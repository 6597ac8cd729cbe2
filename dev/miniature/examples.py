"""Examples of every task: what is asked, which pictures are shown, which texts and pictures follow."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from .texts import QUESTIONS, WHERE, a, caption, name, of_two_question, plan, question, which_question
from .world import COLOURS, GRIDS, PLACES, SHAPES, Scene, Thing, held_out, sample_scene, sample_thing

EDITS = ("recolour", "replace", "add", "remove", "move", "background", "transfer")
SHARES = {"draw": 0.15, "think": 0.09, "understand": 0.42, "edit": 0.28, "story": 0.06}
# Which questions training asks: mostly those whose answer has to be searched for among the codes of the pictures.
DRILL = {
    "which": 0.25,
    "of two": 0.22,
    "where": 0.11,
    "size": 0.1,
    "colour": 0.1,
    "count": 0.13,
    "shape": 0.03,
    "describe": 0.06,
}
PAIRED = ("which", "of two")  # kinds of questions about two pictures


@dataclass(frozen=True)
class Example:
    """One exercise.

    Attributes:
        task: "draw", "think", "understand", "edit" or "story".
        kind: of question or edit; "" elsewhere.
        instruction: what the user writes.
        references: pictures shown with it.
        frames: what follows: a text and then, but for an answer or an ending, a picture.
    """

    task: str
    kind: str
    instruction: str
    references: tuple[Scene, ...]
    frames: tuple[tuple[str, Scene | None], ...]

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """All pictures, in the order of the sequence."""
        return self.references + tuple(scene for _, scene in self.frames if scene)


def example(rng: random.Random, split: str = "train", task: str | None = None) -> Example:
    """A random example of a task (None draws it by SHARES). Every scene of a training example is a training scene."""
    task = task or rng.choices(tuple(SHARES), SHARES.values())[0]
    while True:
        made = _MAKERS[task](rng, split)
        # Of a held-out example the picture to be drawn, or asked about, is held out; the source of an edit need not be.
        judged = made and (made.scenes if split == "train" else made.scenes[-1:])
        if made and all(held_out(scene) == (split == "held-out") for scene in judged):
            return made


def _draw(rng: random.Random, split: str) -> Example:
    scene = sample_scene(rng, split=split)
    return Example("draw", "", caption(scene, rng), (), (("", scene),))


def _think(rng: random.Random, split: str) -> Example:
    scene = sample_scene(rng, split=split)
    return Example("think", "", caption(scene, rng), (), ((plan(scene), scene),))


def _understand(rng: random.Random, split: str) -> Example | None:
    which = rng.random() < 0.2
    scenes = tuple(sample_scene(rng, split=split) for _ in range(2 if which else 1))
    return _ask(scenes, rng, "which" if which else rng.choice(QUESTIONS))


def _ask(scenes: tuple[Scene, ...], rng: random.Random, kind: str) -> Example | None:
    if kind == "which":
        asked = which_question(*scenes, rng)
    elif kind == "of two":
        asked = of_two_question(*scenes, rng)
    else:
        asked = question(*scenes, rng, kind)
    return asked and Example("understand", kind, asked[0], scenes, ((asked[1], None),))


def drill(rng: random.Random, scene: Callable[[], Scene]) -> Example:
    """A question about pictures that `scene` gives, its kind drawn by DRILL."""
    while True:
        kind = rng.choices(tuple(DRILL), DRILL.values())[0]
        if made := _ask(tuple(scene() for _ in range(2 if kind in PAIRED else 1)), rng, kind):
            return made


def reference(scene: Scene, thing: Thing, rng: random.Random) -> str | None:
    """Words that mean one thing of a scene and no other; None where all of these are shared."""
    ways = [lambda t: t.shape, lambda t: name(t, sized=False), name]
    rng.shuffle(ways)
    return next((way(thing) for way in ways if [way(t) for t in scene.things].count(way(thing)) == 1), None)


def _edit(rng: random.Random, split: str) -> Example | None:
    return edit(sample_scene(rng, split=None if split == "held-out" else split), rng, rng.choice(EDITS))


def edit(scene: Scene, rng: random.Random, kind: str) -> Example | None:
    """An edit of a kind (see EDITS); None where the scene does not allow it."""
    old = rng.choice(scene.things)
    meant = reference(scene, old, rng)
    free = [place for place in PLACES if scene.at(place) is None]
    others = [thing for thing in scene.things if thing is not old]
    unused = [colour for colour in COLOURS if colour != scene.background and colour != old.colour]
    references = (scene,)
    if kind == "background":
        colour = rng.choice([c for c in COLOURS if c != scene.background and all(c != t.colour for t in scene.things)])
        words = rng.choice((f"change the background to {colour}", f"make the background {colour}"))
        return Example("edit", kind, words, references, (("", replace(scene, background=colour)),))
    if kind in ("add", "transfer"):
        if len(scene.things) == 3:
            return None
        new = sample_thing(rng, scene.background, free)
        if kind == "add":
            words = f"add {a(name(new))} {WHERE[new.place]}"
        else:
            ground = rng.choice([c for c in COLOURS if c != new.colour])
            references = (scene, Scene((new,), ground, rng.choice(GRIDS)))
            which = rng.choice(("object", new.shape))
            words = f"put the {which} of the second image into the first"
        return Example("edit", kind, words, references, (("", scene.with_things((*scene.things, new))),))
    if meant is None:
        return None
    if kind == "remove":
        if not others:
            return None
        words = rng.choice((f"remove the {meant}", f"take away the {meant}"))
        return Example("edit", kind, words, references, (("", scene.with_things(others)),))
    if kind == "recolour":
        new = replace(old, colour=rng.choice(unused))
        words = rng.choice((f"make the {meant} {new.colour}", f"change the colour of the {meant} to {new.colour}"))
    elif kind == "replace":
        new = replace(old, shape=rng.choice([shape for shape in SHAPES if shape != old.shape]))
        words = f"replace the {meant} with {a(new.shape)}"
    else:
        new = replace(old, place=rng.choice(free))
        words = f"move the {meant} {_TOWARDS[new.place]}"
    return Example("edit", kind, words, references, (("", scene.with_things((*others, new))),))


_TOWARDS = {
    "left": "to the left",
    "right": "to the right",
    "above": "to the top",
    "below": "to the bottom",
    "centre": "to the centre",
}
_OPENINGS = ("First", "Then", "At last")
ENDING = "The end."


def _story(rng: random.Random, split: str) -> Example:
    first = sample_scene(rng, count=1, split=split)
    first = replace(first, grid=GRIDS[0])  # the model chooses the size of a story's pictures, so there is one
    (hero,) = first.things
    count = rng.choice((2, 3))
    moving = rng.random() < 0.5
    choices = PLACES if moving else [colour for colour in COLOURS if colour != first.background]
    field = "place" if moving else "colour"
    steps = [getattr(hero, field)]
    while len(steps) < count:
        steps.append(rng.choice([choice for choice in choices if choice != steps[-1]]))
    heroes = [replace(hero, **{field: step}) for step in steps]
    if moving:
        way = " and then ".join(_TOWARDS[step] for step in steps[1:])
        happens = f"{a(name(hero))} {WHERE[hero.place]} on {a(first.background + ' background')} moves {way}"
        texts = [f"{when}, the {hero.shape} is {WHERE[h.place]}." for when, h in zip(_OPENINGS, heroes, strict=False)]
    else:
        way = " and then ".join(steps[1:])
        happens = f"{a(name(hero))} {WHERE[hero.place]} on {a(first.background + ' background')} turns {way}"
        texts = [f"{when}, the {hero.shape} is {h.colour}." for when, h in zip(_OPENINGS, heroes, strict=False)]
    scenes = [first.with_things((h,)) for h in heroes]
    words = rng.choice((f"Tell a story: {happens}.", f"A story in {('two', 'three')[count - 2]} pictures: {happens}."))
    return Example("story", field, words, (), (*zip(texts, scenes, strict=True), (ENDING, None)))


_MAKERS = {"draw": _draw, "think": _think, "understand": _understand, "edit": _edit, "story": _story}
