"""Questions about one picture or two, and their answers."""

from collections.abc import Callable

from . import chinese
from .texts import told
from .wording import NUMBERS, Wording, a, plural, short, where
from .world import PLACES, SHAPES, Scene, Thing

KINDS = (
    "count",
    "colour",
    "shape",
    "where",
    "size",
    "fill",
    "background",
    "read",
    "letters",
    "compare",
    "beside",
    "behind",
    "touch",
    "describe",
)
Asked = tuple[str, str] | None


def question(scene: Scene, w: Wording, kind: str) -> Asked:
    """A question of a kind (see KINDS) and its answer; None where the scene does not allow it."""
    return _MAKERS[kind](scene, w)


def unique(scene: Scene, w: Wording, of: Callable[[Thing], object] = short) -> Thing | None:
    """A thing that no other is like in some respect."""
    alone = [thing for thing in scene.things if [of(t) for t in scene.things].count(of(thing)) == 1]
    return w.rng.choice(alone) if alone else None


def _count(scene: Scene, w: Wording) -> Asked:
    form = w.rng.randrange(3)
    if form == 0:
        asked = w.pick(
            ("How many objects are there?", "How many things do you see?"), ("How many objects do you see?",)
        )
        return asked, NUMBERS[len(scene.things)]
    of = (lambda t: t.shape) if form == 1 else (lambda t: t.colour)
    some = [of(thing) for thing in scene.things] or [w.rng.choice(SHAPES if form == 1 else scene.colours())]
    what = w.rng.choice((*some, *some, w.rng.choice(SHAPES if form == 1 else scene.colours())))
    answer = NUMBERS[sum(of(thing) == what for thing in scene.things)]
    if form == 1:
        if w.often(0.1):
            return chinese.asked("questions", "count", w.rng, shape=chinese.words()["shapes"][what]), answer
        many = plural(what, 2)
        return w.pick((f"How many {many} are there?", f"Count the {many}."), (f"How many {many} do you see?",)), answer
    return w.pick(
        (f"How many {what} objects are there?", f"Count the {what} objects."), (f"How many are {what}?",)
    ), answer


def _colour(scene: Scene, w: Wording) -> Asked:
    if not (thing := unique(scene, w, lambda t: t.shape)):
        return None
    if w.often(0.1):
        return chinese.asked("questions", "colour", w.rng, **chinese.named(thing)), thing.colour
    return w.pick(
        (f"What colour is the {thing.shape}?", f"Which colour does the {thing.shape} have?"),
        (f"Tell me the colour of the {thing.shape}.", f"The {thing.shape} is of what colour?"),
    ), thing.colour


def _shape(scene: Scene, w: Wording) -> Asked:
    places = [place for place in PLACES if len(scene.at(place)) == 1]
    if not places:
        return None
    place = w.rng.choice(places)
    at = where(place, w)
    return w.pick(
        (f"What is {at}?", f"Which shape is {at}?", f"What do you see {at}?"), (f"{at} there is which shape?",)
    ), scene.at(place)[0].shape


def _where(scene: Scene, w: Wording) -> Asked:
    if not (thing := unique(scene, w)):
        return None
    named = short(thing)
    return w.pick(
        (f"Where is the {named}?", f"Where do you see the {named}?"), (f"At which place is the {named}?",)
    ), thing.place


def _size(scene: Scene, w: Wording) -> Asked:
    if not (thing := unique(scene, w)):
        return None
    named = short(thing)
    return w.pick(
        (f"What size is the {named}?", f"How large is the {named}?"), (f"What is the size of the {named}?",)
    ), thing.size


def _fill(scene: Scene, w: Wording) -> Asked:
    if not (thing := unique(scene, w)):
        return None
    named = short(thing)
    return w.pick(
        (f"Is the {named} plain, striped or hollow?", f"How is the {named} filled?"), (f"What fill has the {named}?",)
    ), thing.fill


def _background(scene: Scene, w: Wording) -> Asked:
    if w.often(0.1):
        return chinese.asked("questions", "background", w.rng), scene.background
    return w.pick(
        ("What is the background?", "What is behind everything?", "Which background does the picture have?"),
        ("Tell me the background.", "Which background is it?"),
    ), scene.background


def _read(scene: Scene, w: Wording) -> Asked:
    if not scene.sign:
        return None
    if w.often(0.1):
        return chinese.asked("questions", "read", w.rng), scene.sign.text
    return w.pick(
        ("What is written?", "Which word is written there?", "Read the text.", "What does the sign say?"),
        ("Read what is written.", "Which text do you see?"),
    ), scene.sign.text


def _letters(scene: Scene, w: Wording) -> Asked:
    if not scene.sign:
        return None
    sign = scene.sign
    if w.often(0.5):
        return w.pick((f"Where is {sign.text} written?", "Where is the text?"), ("Where is the sign?",)), sign.place
    if w.often(0.5):
        return w.pick(
            ("What colour are the letters?", "In which colour is the text?"), ("What colour is the text?",)
        ), sign.ink
    return w.pick(
        ("How many letters does the word have?", "How many characters are written?"), ("How long is the word?",)
    ), NUMBERS[len(sign.text)]


def _compare(scene: Scene, w: Wording) -> Asked:
    shapes = sorted({thing.shape for thing in scene.things})
    if len(shapes) < 2:
        return None
    first, second = w.rng.sample(shapes, 2)
    counts = [sum(thing.shape == shape for thing in scene.things) for shape in (first, second)]
    one, other = plural(first, 2), plural(second, 2)
    asked = w.pick(
        (f"Are there more {one} than {other}?", f"Do you see more {one} than {other}?"),
        (f"More {one} than {other}?",),
    )
    return asked, "yes" if counts[0] > counts[1] else "no"


def _beside(scene: Scene, w: Wording) -> Asked:
    """Which of two lies further to one side."""
    named = [short(thing) for thing in scene.things]
    things = [thing for thing in scene.things if named.count(short(thing)) == 1 and not thing.front]
    if len(things) < 2:
        return None
    first, second = w.rng.sample(things, 2)
    row, column = (divmod(PLACES.index(thing.place), 3) for thing in (first, second))
    across = column[1] - row[1], column[0] - row[0]
    axis = w.rng.randrange(2)
    if across[axis] == 0:
        return None
    word = (("left of", "right of"), ("above", "below"))[axis][w.rng.randrange(2)]
    true = (across[axis] > 0) == (word in ("left of", "above"))
    asked = w.pick(
        (f"Is the {short(first)} {word} the {short(second)}?",),
        (f"{word} the {short(second)}: is the {short(first)} there?",),
    )
    return asked, "yes" if true else "no"


def _behind(scene: Scene, w: Wording) -> Asked:
    pairs = [(scene.at(thing.place)[0], thing) for thing in scene.things if thing.front]
    if not pairs:
        return None
    back, front = w.rng.choice(pairs)
    if unique(scene, w) is None or [short(t) for t in scene.things].count(short(front)) > 1:
        return None
    if w.often(0.5):
        named = f"{a(short(back))}"
        return w.pick((f"What is behind the {short(front)}?",), (f"What does the {short(front)} cover?",)), named
    if [short(t) for t in scene.things].count(short(back)) > 1:
        return None
    return w.pick((f"What is in front of the {short(back)}?",), (f"What covers the {short(back)}?",)), a(short(front))


def _touch(scene: Scene, w: Wording) -> Asked:
    """What touches what: which it is, or whether two do."""
    named = [short(thing) for thing in scene.things]
    alone = [thing for thing in scene.things if named.count(short(thing)) == 1]
    pairs = [(scene.at(thing.place)[0], thing) for thing in alone if thing.touching]
    if pairs and w.often(0.7):
        asked, answer = w.rng.sample(w.rng.choice(pairs), 2)
        if named.count(short(asked)) == 1 and w.often(0.6):
            said = short(asked)
            return w.pick((f"What touches the {said}?", f"Which object touches the {said}?"), (
                f"What does the {said} touch?",
            )), a(short(answer))  # fmt: skip
    elif len(alone) >= 2:
        asked, answer = w.rng.sample(alone, 2)
    else:
        return None
    if {named.count(short(asked)), named.count(short(answer))} != {1}:
        return None
    yes = asked.place == answer.place and (asked.touching or answer.touching)
    one, other = short(asked), short(answer)
    forms = (f"Does the {one} touch the {other}?", f"Do the {one} and the {other} touch?")
    return w.pick(forms, (f"Is the {one} touching the {other}?",)), "yes" if yes else "no"


def _describe(scene: Scene, w: Wording) -> Asked:
    return w.pick(
        ("Describe the picture.", "What do you see?", "Describe this image.", "What does the picture show?"),
        ("Describe what you see.", "Describe the image."),
    ), told(scene)


_MAKERS = {
    "count": _count,
    "colour": _colour,
    "shape": _shape,
    "where": _where,
    "size": _size,
    "fill": _fill,
    "background": _background,
    "read": _read,
    "letters": _letters,
    "compare": _compare,
    "beside": _beside,
    "behind": _behind,
    "touch": _touch,
    "describe": _describe,
}


def which_question(first: Scene, second: Scene, w: Wording) -> Asked:
    """Which of two pictures something is true of; None where both or neither would be right."""
    pick, answer = w.rng.choice(((first, "the first"), (second, "the second")))
    other = second if pick is first else first
    kind = w.rng.randrange(4)
    if kind == 0 and pick.things:
        named = short(w.rng.choice(pick.things))
        if named not in {short(thing) for thing in other.things}:
            return w.pick((f"Which picture has {a(named)}?", f"In which picture is {a(named)}?")), answer
    if kind == 1 and pick.background != other.background:
        return w.pick((f"Which picture has the background {pick.background}?",)), answer
    if kind == 2 and len(pick.things) > len(other.things):
        return w.pick(("Which picture has more objects?", "In which picture are more objects?")), answer
    if kind == 3 and pick.sign and not (other.sign and other.sign.text == pick.sign.text):
        return w.pick(
            (f"In which picture is {pick.sign.text} written?", f"Which picture says {pick.sign.text}?")
        ), answer
    return None


def of_two_question(first: Scene, second: Scene, w: Wording) -> Asked:
    """A question about one of two pictures and its answer; None where that picture allows none."""
    scene, which = w.rng.choice(((first, "first"), (second, "second")))
    asked = question(scene, w, w.rng.choice(KINDS))
    if not asked or not asked[0].isascii():
        return None
    return f"{asked[0].rstrip('?.')} in the {which} picture{asked[0][-1]}", asked[1]
