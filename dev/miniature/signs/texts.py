"""What is said of scenes: prompts that ask for them, the listing that a plan ends with, and how that is read back."""

import re
from collections import Counter
from dataclasses import replace

from .wording import NUMBERS, Wording, a, ground, listing, name, noun, where, written
from .world import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    INKS,
    PLACES,
    SHAPES,
    SIGNED,
    SIZES,
    Scene,
    Sign,
    Thing,
    in_order,
    layout,
)

_NAME = rf"({'|'.join(SIZES)}) (?:({'|'.join(FILLS[1:])}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_AT = re.compile(rf"({'|'.join(sorted(PLACES, key=len, reverse=True))}): {_NAME}(?:, (in front|touching) {_NAME})?")
_WRITTEN = re.compile(rf"({'|'.join(SIGNED)}): ([A-Z0-9]+) in ({'|'.join(INKS)})")


def told(scene: Scene) -> str:
    """Everything of a scene in its one exact form: "meadow; left: large red circle, in front small blue star".

    Of two that touch, the second is the left one: "white; top: small red circle, touching small blue star".
    """
    parts = [scene.background]
    if scene.sign:
        parts.append(f"{scene.sign.place}: {scene.sign.text} in {scene.sign.ink}")
    for place in PLACES:
        if here := scene.at(place):
            parts.append(f"{place}: {name(here[0])}")
            parts[-1] += "".join(f", {'in front' if one.front else 'touching'} {name(one)}" for one in here[1:])
    return "; ".join(parts)


def read_scene(text: str, grid: tuple[int, int]) -> Scene | None:
    """The scene that `told` speaks of; None where it is no such text."""
    background, *parts = text.strip().split("; ")
    if background not in BACKGROUNDS:
        return None
    things: list[Thing] = []
    sign = None
    for part in parts:
        if found := _WRITTEN.fullmatch(part):
            sign = Sign(found[2], found[3], found[1])
        elif found := _AT.fullmatch(part):
            place, *named = found.groups()
            how = named.pop(4)
            for values, front, touching in ((named[:4], False, False), (named[4:], how == "in front", bool(how))):
                size, fill, colour, shape = values
                if shape:
                    things.append(Thing(shape, colour, size, fill or "plain", place, front, touching and not front))
        else:
            return None
    return Scene(in_order(things), background, sign, grid)


def caption(scene: Scene, w: Wording) -> str:
    """A prompt that asks for the scene. What it leaves out has a default.

    The defaults: large, plain; a single thing in the centre, so many of a kind as `layout` has them; what touches
    another stands to its left; a white background; letters in black, at the bottom.
    """
    parts = _parts(scene, w)
    if scene.sign:
        parts.append(sign_clause(scene.sign, w))
    body = listing(parts) if w.often(0.7) else ", ".join(parts)
    return framed(body, scene, w)


def framed(body: str, scene: Scene, w: Wording) -> str:
    """What is to be seen, with its background, a word on what is not there, and an opening."""
    if scene.background != "white" or w.often(0.5):
        behind, _ = ground(scene.background, w)
        if w.often(0.2):
            body = f"{behind}: {body}" if w.often(0.5) else f"{behind}, {body}"
        elif scene.background in COLOURS and w.often(0.2):
            body = w.pick((f"{body}. The background is {scene.background}", f"{body}; {scene.background} background"))
        else:
            body = f"{body} {behind}" if w.often(0.7) else f"{body}, {behind}"
    if w.often(0.15):
        body = f"{body}, {absent(scene, w)}"
    opening = w.pick(
        ("", "", "", "draw ", "a picture of ", "please draw ", "show ", "I want to see ", "an image with ", "paint "),
        ("could you draw ", "show me ", "a drawing of ", "I would like to have "),
    )
    text = opening + body
    if w.often(0.25):
        text = text[0].upper() + text[1:] + "."
    return text


def absent(scene: Scene, w: Wording) -> str:
    """A word on something that is not there: it changes nothing."""
    shapes = [shape for shape in SHAPES if shape not in {thing.shape for thing in scene.things}]
    shape = w.rng.choice(shapes)
    options = [f"no {shape}", f"without {a(shape)}", f"but no {shape}", f"there is no {shape}"]
    if scene.sign is None:
        options += ["no text", "without any words"]
    return w.pick(options, [f"no {shape} anywhere", f"and not {a(shape)}"])


def _parts(scene: Scene, w: Wording) -> list[str]:
    """The things of a scene as noun phrases with their places."""
    singles = [scene.at(place) for place in PLACES if len(scene.at(place)) == 1]
    parts = [_pair(*here, w) for here in map(scene.at, PLACES) if len(here) == 2]
    things = [here[0] for here in singles]
    if not parts and (related := _related(things, w)):
        return [related]
    alone = not parts and not scene.sign
    kinds = Counter(replace(thing, place="") for thing in things)
    for kind, count in kinds.items():
        places = [thing.place for thing in things if replace(thing, place="") == kind]
        if count > 1 and w.often(0.9):
            parts.append(_many(kind, places, len(kinds) == 1, w))
        elif alone and len(things) == 1 and places == ["centre"] and w.often(0.4):
            parts.append(a(noun(kind, w)))
        else:
            parts += [f"{a(noun(kind, w))} {where(place, w)}" for place in places]
    w.rng.shuffle(parts)
    return parts


def _many(kind: Thing, places: list[str], only: bool, w: Wording) -> str:
    """ "three red circles", where they stand if that is not the default."""
    count = len(places)
    words = f"{NUMBERS[count] if w.often(0.75) else count} {noun(kind, w, count, 0.2)}"
    if only and tuple(places) == layout(count):
        if count == 3 and w.often(0.4):
            words += w.pick((" in a row", " side by side", " next to each other"), (" in a line",))
        return words
    known = {("left", "centre", "right"): "in a row", ("top", "centre", "bottom"): "in a column"}
    if tuple(places) in known and w.often(0.5):
        return f"{words} {known[tuple(places)]}"
    return f"{words}: {listing([where(place, w) for place in places])}"


def _pair(back: Thing, front: Thing, w: Wording) -> str:
    """A large thing and a small one over it, or two small ones that touch."""
    if front.touching:
        return _touching(back, front, w)
    behind, before, at = noun(back, w), noun(front, w), where(back.place, w)
    return w.pick(
        (
            f"{a(before)} in front of {a(behind)} {at}",
            f"{a(behind)} behind {a(before)} {at}",
            f"{a(behind)} {at} with {a(before)} in front of it",
            f"{at} {a(before)} over {a(behind)}",
        ),
        (f"{a(behind)} {at}, {a(before)} in front of it", f"{a(before)} {at} with {a(behind)} behind it"),
    )


def _touching(right: Thing, left: Thing, w: Wording) -> str:
    """Two small things of which the left one touches the right one."""
    one, other, at = a(noun(left, w)), a(noun(right, w)), where(right.place, w)
    return w.pick(
        (
            f"{one} touching {other} {at}",
            f"{at} {one} that touches {other}",
            f"{other} {at} with {one} touching its left side",
            f"{at} {other}, touched by {one}",
        ),
        (f"{at} {one} up against {other}", f"{other} {at}, and {one} touches it"),
    )


def _related(things: list[Thing], w: Wording) -> str | None:
    """Two or three things in a row or a column, told by one another; None where they do not stand so."""
    places = tuple(thing.place for thing in things)
    if len({replace(thing, place="") for thing in things}) != len(things) or not w.often(0.6):
        return None
    nouns = [a(noun(thing, w)) for thing in things]
    if places == ("left", "right"):
        first, second = nouns
        return w.pick(
            (
                f"{first} to the left of {second}",
                f"{second} to the right of {first}",
                f"{first} left of {second}",
                f"{first} beside {second}, which is on the right",
                f"{second} with {first} on its left",
            ),
            (f"{second} right of {first}", f"{first} with {second} to its right"),
        )
    if places == ("top", "bottom"):
        first, second = nouns
        return w.pick(
            (
                f"{first} above {second}",
                f"{second} below {first}",
                f"{second} under {first}",
                f"{first} over the top of {second}",
                f"{second} with {first} above it",
            ),
            (f"{first} with {second} below it", f"above {second} {first}"),
        )
    if places in (("left", "centre", "right"), ("top", "centre", "bottom")):
        first, middle, last = nouns
        column = places[0] == "top"
        way = (
            w.pick(("from top to bottom", "one below the other"))
            if column
            else w.pick(("from left to right", "in a row"))
        )
        return w.pick(
            (
                f"{first}, {middle} and {last} {way}",
                f"{way}: {first}, {middle} and {last}",
                f"{middle} between {first} on the {places[0]} and {last} on the {places[2]}",
            ),
            (f"{middle} between {first} {'above' if column else 'left'} and {last} {'below' if column else 'right'}",),
        )
    return None


def sign_clause(sign: Sign, w: Wording) -> str:
    """A sign with its place; the defaults may go unsaid."""
    quoted = f'"{sign.text}"'
    if sign.ink == "black" and sign.place == "bottom" and w.often(0.5):
        return w.pick(
            (f"the text {quoted}", f"the word {quoted} below", f"a sign {quoted}", f"a sign that says {quoted}"),
            (f"{quoted} as text",),
        )
    at = where(sign.place, w)
    return w.pick(
        (
            f"{written(sign, w)} {at}",
            f"{at} {written(sign, w)}",
            f"{quoted} written in {sign.ink} {at}",
            f"a sign {at} that says {quoted} in {sign.ink}",
            f"the text {quoted} in {sign.ink} letters {at}",
        ),
        (f"{at} {quoted} in {sign.ink} letters", f"{sign.ink} text {at} that says {quoted}"),
    )


def same_answer(given: str, right: str) -> bool:
    """Whether an answer says what the right one says: case, a full stop and spaces aside."""
    return " ".join(given.lower().strip(" .").split()) == " ".join(right.lower().strip(" .").split())
