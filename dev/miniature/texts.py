"""What is said about scenes: captions, plans, descriptions, questions; and how such texts are read back."""

import random
import re

from .world import COLOURS, PLACES, RADII, SHAPES, Scene, Thing, in_order

NUMBERS = ("zero", "one", "two", "three")
WHERE = {
    "left": "on the left",
    "right": "on the right",
    "above": "at the top",
    "below": "at the bottom",
    "centre": "in the centre",
}
_OTHER_WHERE = {
    "left": ("at the left", "on the left side"),
    "right": ("at the right", "on the right side"),
    "above": ("on top", "above"),
    "below": ("below", "in the lower part"),
    "centre": ("in the middle", "at the centre"),
}
_COLOUR, _SHAPE, _SIZE = "|".join(COLOURS), "|".join(SHAPES), "|".join(RADII)
_DESCRIBED = re.compile(rf"({_SIZE}) ({_COLOUR}) ({_SHAPE}) ({'|'.join(WHERE.values())})")
_PLANNED = re.compile(rf"one ({_SHAPE}), ({_COLOUR}), ({_SIZE}), ({'|'.join(PLACES)})")
_BACKGROUND = re.compile(rf"({_COLOUR}) background")


def a(noun: str) -> str:
    """A noun with its article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def name(thing: Thing, sized: bool = True) -> str:
    """ "large red circle"."""
    return f"{thing.size} {thing.colour} {thing.shape}" if sized else f"{thing.colour} {thing.shape}"


def listing(parts: list[str]) -> str:
    """ "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(scene: Scene, rng: random.Random) -> str:
    """A prompt that asks for the scene. What it leaves out has a default: large, in the centre if alone, white."""
    things = list(scene.things)

    def named(thing: Thing) -> str:
        return a(name(thing, sized=thing.size == "small" or rng.random() < 0.8))

    def placed(thing: Thing) -> str:
        if len(things) == 1 and thing.place == "centre" and rng.random() < 0.4:
            return named(thing)
        where = WHERE[thing.place] if rng.random() < 0.6 else rng.choice(_OTHER_WHERE[thing.place])
        return f"{named(thing)} {where}"

    related = _relation(things, named, rng) if rng.random() < 0.6 else None
    if related is None:
        rng.shuffle(things)
        related = listing([placed(thing) for thing in things])
    if scene.background == "white" and rng.random() < 0.4:
        text = related
    else:
        ground = a(f"{scene.background} background")
        text = rng.choice(
            (f"{related} on {ground}", f"{related} on {ground}", f"{related}, {ground}", f"on {ground}, {related}")
        )
    if not text.startswith("on "):
        text = rng.choice(("", "", "", "draw ", "a picture of ", "please draw ")) + text
    if rng.random() < 0.2:
        text = text[0].upper() + text[1:] + "."
    return text


def _relation(things: list[Thing], named, rng: random.Random) -> str | None:
    """Two things that face each other, one told by the other."""
    places = tuple(thing.place for thing in things)
    if places == ("left", "right"):
        words = ("to the left of", "to the right of")
    elif places == ("above", "below"):
        words = ("above", "below")
    else:
        return None
    first, second = things
    if rng.random() < 0.5:
        return f"{named(first)} {words[0]} {named(second)}"
    return f"{named(second)} {words[1]} {named(first)}"


def plan(scene: Scene) -> str:
    """The thinking trace: everything the picture needs, one object after the other."""
    parts = [f"one {t.shape}, {t.colour}, {t.size}, {t.place}" for t in scene.things]
    return "; ".join([*parts, f"{scene.background} background"])


def description(scene: Scene) -> str:
    """The answer to "describe the picture": always the same words for the same scene."""
    parts = [f"{a(name(thing))} {WHERE[thing.place]}" for thing in scene.things]
    return f"{listing(parts)} on {a(scene.background + ' background')}"


def read_scene(text: str) -> tuple[tuple[Thing, ...], str | None]:
    """Things and background that a plan or a description speaks of."""
    by_phrase = {phrase: place for place, phrase in WHERE.items()}
    things = {Thing(shape, colour, size, by_phrase[where]) for size, colour, shape, where in _DESCRIBED.findall(text)}
    things |= {Thing(*found) for found in _PLANNED.findall(text)}
    ground = _BACKGROUND.search(text)
    return in_order(things), ground and ground[1]


def same_answer(given: str, right: str) -> bool:
    """Whether an answer says what the right one says; descriptions are compared by what they speak of."""
    things, ground = read_scene(right)
    if things:
        return read_scene(given) == (things, ground)
    return given.strip().lower().rstrip(".") == right


def question(scene: Scene, rng: random.Random, kind: str) -> tuple[str, str] | None:
    """A question of a kind (see QUESTIONS) about one picture and its answer; None where the scene allows none."""
    thing = rng.choice(scene.things)
    alone = sum(t.shape == thing.shape for t in scene.things) == 1
    unique = sum((t.shape, t.colour) == (thing.shape, thing.colour) for t in scene.things) == 1
    where = WHERE[thing.place]
    if kind == "shape":
        return rng.choice((f"What shape is {where}?", f"Which shape do you see {where}?")), thing.shape
    if kind == "colour":
        asked = [f"What colour is the object {where}?"] + [f"What colour is the {thing.shape}?"] * 2 * alone
        if rng.random() < 0.25:
            return "What colour is the background?", scene.background
        return rng.choice(asked), thing.colour
    if kind == "count":
        if rng.random() < 0.5:
            return rng.choice(("How many objects are there?", "How many shapes do you see?")), NUMBERS[
                len(scene.things)
            ]
        shape = thing.shape if rng.random() < 0.7 else rng.choice(SHAPES)
        return f"How many {shape}s are there?", NUMBERS[sum(t.shape == shape for t in scene.things)]
    if kind == "where" and unique:
        return f"Where is the {name(thing, sized=False)}?", where
    if kind == "size" and unique:
        return f"What size is the {name(thing, sized=False)}?", thing.size
    if kind == "describe":
        return rng.choice(("Describe the picture.", "What do you see?", "Describe this image.")), description(scene)
    return None


def which_question(first: Scene, second: Scene, rng: random.Random) -> tuple[str, str] | None:
    """A which-picture question about two pictures and its answer; None where both or neither would be right."""
    pick, answer = rng.choice(((first, "the first"), (second, "the second")))
    other = second if pick is first else first
    thing = rng.choice(pick.things)
    kind = rng.randrange(3)
    if kind == 0 and (thing.shape, thing.colour) not in {(t.shape, t.colour) for t in other.things}:
        return f"Which picture has {a(name(thing, sized=False))}?", answer
    if kind == 1 and pick.background != other.background:
        return f"Which picture has {a(pick.background + ' background')}?", answer
    if kind == 2 and len(pick.things) > len(other.things):
        return "Which picture has more objects?", answer
    return None


def of_two_question(first: Scene, second: Scene, rng: random.Random) -> tuple[str, str] | None:
    """A question about one of two pictures and its answer; None where that picture allows none."""
    scene, which = rng.choice(((first, "first"), (second, "second")))
    kind = rng.choice(QUESTIONS)
    if kind == "describe":
        return f"Describe the {which} picture.", description(scene)
    asked = question(scene, rng, kind)
    return asked and (f"{asked[0].removesuffix('?')} in the {which} picture?", asked[1])


QUESTIONS = ("shape", "colour", "count", "where", "size", "describe")
