"""Stories of two to four pictures, whose texts and pictures tell the same."""

from dataclasses import replace

from .edits import TOWARDS
from .wording import NUMBERS, Wording, a, ground, noun, plural, where
from .world import PLACES, TOLD, WORDS, Scene, Sign, layout, sample_scene, sample_thing

OPENINGS = ("First", "Then", "Next", "At last")
ENDING = "The end."
KINDS = ("place", "colour", "count", "word")
Told = tuple[str, list[tuple[str, Scene]]]


def story(w: Wording, kind: str, split: str | None) -> Told:
    """An instruction, and the frames that follow: each a text and its picture."""
    frames = w.rng.choice((2, 3, 3, 4))
    first = sample_scene(w.rng, count=1, split=split, grids=(TOLD,))
    first = replace(first.with_things((replace(first.things[0], front=False, touching=False),)), sign=None)
    words, texts, scenes = _MAKERS[kind](w, first, frames)
    opening = w.pick(
        ("Tell a story: ", f"A story in {NUMBERS[frames]} pictures: ", "Tell and draw: "),
        ("A story: ", "Draw a story: "),
    )
    return opening + words + ".", list(zip(texts, scenes, strict=True))


def _steps(w: Wording, start: str, choices, count: int) -> list[str]:
    steps = [start]
    while len(steps) < count:
        steps.append(w.rng.choice([choice for choice in choices if choice != steps[-1]]))
    return steps


def _behind(first: Scene, w: Wording) -> str:
    return ground(first.background, w)[0]


def _place(w: Wording, first: Scene, count: int):
    hero = first.things[0]
    steps = _steps(w, hero.place, PLACES, count)
    way = " and then ".join(w.rng.choice(TOWARDS[step]) for step in steps[1:])
    words = (
        f"{a(noun(hero, w))} {where(hero.place, w)} {_behind(first, w)} {w.pick(('moves', 'goes'), ('wanders',))} {way}"
    )
    texts = [f"{when}, the {hero.shape} is at: {step}." for when, step in zip(OPENINGS, steps, strict=False)]
    return words, texts, [first.with_things((replace(hero, place=step),)) for step in steps]


def _colour(w: Wording, first: Scene, count: int):
    hero = first.things[0]
    steps = _steps(w, hero.colour, first.colours(), count)
    way = " and then ".join(steps[1:])
    words = f"{a(noun(hero, w))} {where(hero.place, w)} {_behind(first, w)} {w.pick(('turns', 'becomes'))} {way}"
    texts = [f"{when}, the {hero.shape} is {step}." for when, step in zip(OPENINGS, steps, strict=False)]
    return words, texts, [first.with_things((replace(hero, colour=step),)) for step in steps]


def _count(w: Wording, first: Scene, count: int):
    """One comes, or goes, at a time."""
    hero = first.things[0]
    start = w.rng.randint(1, 6)
    by = 1 if start + count - 1 <= 6 and (start < count or w.often(0.5)) else -1
    if by < 0 and start - count + 1 < 1:
        start = count
    numbers = [start + by * i for i in range(count)]
    many = f"{NUMBERS[start]} {noun(hero, w, start, 0.2)}"
    happens = f"{NUMBERS[count - 1]} times one more comes" if by > 0 else f"{NUMBERS[count - 1]} times one goes away"
    texts = [
        f"{when}, there {'is' if n == 1 else 'are'} {NUMBERS[n]} {plural(hero.shape, n)}."
        for when, n in zip(OPENINGS, numbers, strict=False)
    ]
    scenes = [first.with_things([replace(hero, place=place) for place in layout(n) or ()]) for n in numbers]
    return f"{many} {_behind(first, w)}, and {happens}", texts, scenes


def _word(w: Wording, first: Scene, count: int):
    """A word is written letter by letter, below a thing."""
    word = w.rng.choice([word for word in WORDS if len(word) == count])
    hero = replace(first.things[0], place="centre")
    hero = sample_thing(w.rng, first.colours(), "centre") if hero.front else hero
    ink = w.rng.choice(first.inks())
    words = (
        f"below {a(noun(hero, w))} {_behind(first, w)} the word {word} is written in {ink}, one letter after the other"
    )
    texts = [f"{when}, it says {word[:i]}." for i, when in enumerate(OPENINGS[:count], 1)]
    scenes = [replace(first.with_things((hero,)), sign=Sign(word[:i], ink, "bottom")) for i in range(1, count + 1)]
    return words, texts, scenes


_MAKERS = {"place": _place, "colour": _colour, "count": _count, "word": _word}
