"""Prompts whose scene has to be worked out first: sums, mixtures, orders, facts, and words that are turned round.

Each comes with the thinking that leads to its scene: a sentence or two, then the scene as `texts.told` has it.
"""

import random
from dataclasses import replace

from .texts import framed, read_scene, told
from .wording import NUMBERS, Wording, a, listing, noun, plural
from .world import BACKGROUNDS, COLOURS, PLACES, SHAPES, WORDS, Scene, Sign, Thing, in_order, layout

MIXTURES = {
    ("red", "yellow"): "orange",
    ("blue", "yellow"): "green",
    ("blue", "red"): "purple",
    ("red", "white"): "pink",
}
OPPOSITES = {"black": "white", "white": "black"}
NAMES = ("Ann", "Tom", "Eva", "Max", "Ida", "Ben", "Lin", "Wei")
LEGS = {
    "a cat": 4,
    "a dog": 4,
    "a bird": 2,
    "a fly": 6,
    "a hen": 2,
    "a table": 4,
    "an ant": 6,
    "a hand": 5,
}
KINDS = ("sum", "mixture", "order", "fact", "number", "backwards", "both")


def thought(reasoning: str, scene: Scene) -> str:
    """What is thought before a scene is drawn."""
    return f"{reasoning} {told(scene)}" if reasoning else told(scene)


def read_thought(text: str, grid: tuple[int, int]) -> Scene | None:
    """The scene that such a text ends with."""
    return read_scene(text.strip().rsplit(". ", 1)[-1], grid)


def planned(w: Wording, kind: str, grid: tuple[int, int]) -> tuple[str, str, Scene]:
    """A prompt of a kind, the thinking it needs, and its scene."""
    return _MAKERS[kind](w, Scene((), _background(w.rng), None, grid))


def _background(rng: random.Random) -> str:
    return rng.choice(("white", "white", *BACKGROUNDS))


def _thing(w: Wording, empty: Scene, **given: str) -> Thing:
    values = {"shape": w.rng.choice(SHAPES), "colour": w.rng.choice(empty.colours()), "size": "large"}
    values["size"] = w.rng.choice(("large", "large", "small"))
    return Thing(**{**values, **given})


def _row(thing: Thing, count: int) -> list[Thing]:
    return [replace(thing, place=place) for place in layout(count) or ()]


def _count(w: Wording) -> tuple[int, str, str]:
    """A number from one to six, how it is asked for, and why it is so many."""
    rng = w.rng
    while True:
        x, y, z = rng.randint(1, 6), rng.randint(1, 5), rng.randint(1, 4)
        form = rng.randrange(4)
        if form == 0 and x + y <= 6:
            words = w.pick((f"{NUMBERS[x]} plus {NUMBERS[y]}", f"{x} + {y}", f"{NUMBERS[x]} and {NUMBERS[y]} more"))
            return x + y, words, f"{NUMBERS[x]} plus {NUMBERS[y]} is {NUMBERS[x + y]}."
        if form == 1 and x > y:
            words = w.pick((f"{NUMBERS[x]} minus {NUMBERS[y]}", f"{x} - {y}", f"{NUMBERS[y]} less than {NUMBERS[x]}"))
            return x - y, words, f"{NUMBERS[x]} minus {NUMBERS[y]} is {NUMBERS[x - y]}."
        if form == 2 and x + y <= 6 and x + y - z >= 1:
            words = w.pick((f"{NUMBERS[x]} plus {NUMBERS[y]} minus {NUMBERS[z]}", f"{x} + {y} - {z}"))
            first = f"{NUMBERS[x]} plus {NUMBERS[y]} is {NUMBERS[x + y]}"
            return x + y - z, words, f"{first}, minus {NUMBERS[z]} is {NUMBERS[x + y - z]}."
        if form == 3:
            animal = rng.choice(tuple(LEGS))
            part = "fingers" if animal == "a hand" else "legs"
            words = w.pick((f"as many as {animal} has {part}:", f"as many as the {part} of {animal}:"))
            return LEGS[animal], words, f"{animal} has {NUMBERS[LEGS[animal]]} {part}."


def _colour(w: Wording, empty: Scene) -> tuple[str, str, str]:
    """A colour seen there, how it is asked for behind a thing, and why it is this one."""
    while True:
        if w.often(0.85):
            both, made = w.rng.choice(tuple(MIXTURES.items()))
            first, second = w.rng.sample(both, 2)
            words = w.pick(
                (f"in the colour that {first} and {second} make", f"whose colour is {first} mixed with {second}"),
                (f"whose colour {first} and {second} make",),
            )
            why = f"{first} and {second} make {made}."
        else:
            first, made = w.rng.choice(tuple(OPPOSITES.items()))
            words, why = f"in the opposite of {first}", f"the opposite of {first} is {made}."
        if made in empty.colours():
            return made, words, why


def _plain(thing: Thing, count: int = 1) -> str:
    """A thing without its colour."""
    words = f"{'' if thing.size == 'large' else 'small '}{plural(thing.shape, count)}"
    return a(words) if count == 1 else words


def _sum(w: Wording, empty: Scene) -> tuple[str, str, Scene]:
    count, words, why = _count(w)
    thing = _thing(w, empty)
    scene = empty.with_things(_row(thing, count))
    return framed(f"{words} {noun(thing, w, 2, 0.2)}", scene, w), why, scene


def _mixture(w: Wording, empty: Scene) -> tuple[str, str, Scene]:
    colour, words, why = _colour(w, empty)
    first = _thing(w, empty, colour=colour)
    if w.often(0.4):
        return framed(f"{_plain(first)} {words}", scene := empty.with_things([first]), w), why, scene
    second = _thing(w, empty)
    if w.often(0.4) and len(empty.colours()) == len(COLOURS) - 1:
        colour, more, also = _colour(w, empty)
        second = replace(second, colour=colour)
        why = f"{why} {also}"
        words_of = f"{_plain(second)} {more}"
    else:
        words_of = a(noun(second, w))
    scene = empty.with_things([replace(first, place="left"), replace(second, place="right")])
    return framed(f"{_plain(first)} {words} on the left and {words_of} on the right", scene, w), why, scene


def _order(w: Wording, empty: Scene) -> tuple[str, str, Scene]:
    count = w.rng.choice((3, 3, 2))
    shapes = w.rng.sample(SHAPES, count)
    size = w.rng.choice(("large", "small"))
    things = [_thing(w, empty, shape=shape, size=size) for shape in shapes]
    column = w.often(0.3)
    places = [p for i, p in enumerate(("top", "centre", "bottom") if column else ("left", "centre", "right"))]
    places = places if count == 3 else places[::2]
    way = "from top to bottom" if column else "from left to right"
    given = things[:]
    w.rng.shuffle(given)
    form = w.rng.randrange(3)
    named = listing([a(noun(thing, w)) for thing in given])
    if form == 0:
        ordered = sorted(things, key=lambda thing: thing.shape)
        words = w.pick((f"{named}, {way} in the order of the alphabet", f"{named} sorted by their names {way}"))
    elif form == 1 and count == 3:
        ordered = things
        first, second, third = (thing.shape for thing in things)
        rules = [f"the {first} before the {second}", f"the {second} before the {third}"]
        w.rng.shuffle(rules)
        words = f"{named} {way}, {rules[0]} and {rules[1]}"
    else:
        ordered = given[::-1]
        words = w.pick((f"{named} {way}, but in reverse order", f"{named} {way}, the last one first"))
    scene = empty.with_things([replace(thing, place=place) for thing, place in zip(ordered, places, strict=True)])
    return framed(words, scene, w), f"{way}: {', '.join(thing.shape for thing in ordered)}.", scene


def _fact(w: Wording, empty: Scene) -> tuple[str, str, Scene]:
    people = w.rng.sample(NAMES, w.rng.choice((2, 3)))
    likes = w.rng.sample(empty.colours(), len(people))
    who = w.rng.randrange(len(people))
    told_of = [w.pick((f"{n} likes {c}.", f"The colour of {n} is {c}.", f"{n} has chosen {c}.")) for n, c in
               zip(people, likes, strict=True)]  # fmt: skip
    thing = _thing(w, empty, colour=likes[who])
    place = w.rng.choice(("centre", *PLACES))
    scene = empty.with_things([replace(thing, place=place)])
    colour = w.pick((f"in the colour of {people[who]}", f"in the colour that {people[who]} likes"))
    at = "" if place == "centre" else f", {place}"
    return (
        f"{' '.join(told_of)} {framed(f'{_plain(thing)} {colour}{at}', scene, w)}",
        f"{people[who]}: {likes[who]}.",
        scene,
    )


def _number(w: Wording, empty: Scene) -> tuple[str, str, Scene]:
    x, y = w.rng.randint(2, 40), w.rng.randint(2, 29)
    minus = w.often(0.4) and x > y
    result = x - y if minus else x + y
    ink = w.rng.choice(empty.inks())
    place = w.rng.choice(("centre", "bottom", "top"))
    scene = replace(empty, sign=Sign(str(result), ink, place))
    sign, word = ("-", "minus") if minus else ("+", "plus")
    asked = w.pick((f"the result of {x} {sign} {y}", f"the number that is {x} {word} {y}", f"what {x} {word} {y} is"))
    at = {"centre": "in the middle", "bottom": "at the bottom", "top": "at the top"}[place]
    return framed(f"{asked}, written in {ink} {at}", scene, w), f"{x} {word} {y} is {result}.", scene


def _backwards(w: Wording, empty: Scene) -> tuple[str, str, Scene]:
    word = w.rng.choice(WORDS)
    ink, place = w.rng.choice(empty.inks()), w.rng.choice(("centre", "bottom", "top"))
    at = {"centre": "in the middle", "bottom": "at the bottom", "top": "at the top"}[place]
    form = w.rng.randrange(3)
    if form == 0:
        text, asked = word[::-1], w.pick((f'the word "{word}" backwards', f'"{word}" read from right to left'))
    elif form == 1 and len(word) > 2:
        text, asked = word[1:], w.pick((f'"{word}" without its first letter',))
    else:
        text, asked = word[:-1], w.pick((f'"{word}" without its last letter',))
    scene = replace(empty, sign=Sign(text, ink, place))
    return framed(f"{asked}, written in {ink} {at}", scene, w), f"{' '.join(word)}: {' '.join(text)}.", scene


def _both(w: Wording, empty: Scene) -> tuple[str, str, Scene]:
    count, words, why = _count(w)
    colour, of, also = _colour(w, empty)
    thing = _thing(w, empty, colour=colour)
    scene = empty.with_things(in_order(_row(thing, count)))
    return framed(f"{words} {_plain(thing, 2)} {of}", scene, w), f"{why} {also}", scene


_MAKERS = {
    "sum": _sum,
    "mixture": _mixture,
    "order": _order,
    "fact": _fact,
    "number": _number,
    "backwards": _backwards,
    "both": _both,
}
