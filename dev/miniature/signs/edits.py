"""Edits: what is to change in a picture, in words, and the scene it becomes."""

from dataclasses import replace

from . import chinese
from .wording import OTHER_SHAPES, Wording, a, name, noun, short, where
from .world import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    PLACES,
    SCENERY,
    SHAPES,
    SIGNED,
    Scene,
    Sign,
    Thing,
    ground_colours,
    problem,
    sample_scene,
    sample_sign,
    sample_thing,
    sample_word,
    second,
)

KINDS = (
    "recolour",
    "replace",
    "resize",
    "refill",
    "add",
    "remove",
    "move",
    "swap",
    "background",
    "text",
    "write",
    "erase",
    "cover",
    "touch",
    "transfer",
    "several",
)
Change = tuple[str, Scene]
TOWARDS = {
    "top left": ("to the top left", "into the top left corner"),
    "top": ("to the top", "up to the top"),
    "top right": ("to the top right", "into the top right corner"),
    "left": ("to the left", "over to the left side"),
    "centre": ("to the centre", "to the middle"),
    "right": ("to the right", "over to the right side"),
    "bottom left": ("to the bottom left", "into the bottom left corner"),
    "bottom": ("to the bottom", "down to the bottom"),
    "bottom right": ("to the bottom right", "into the bottom right corner"),
}


def reference(scene: Scene, thing: Thing, w: Wording) -> str | None:
    """Words that mean one thing of a scene and no other; None where all of these are shared."""
    ways = [lambda t: t.shape, short, name, lambda t: f"{t.shape} {at}" if t.place == thing.place else ""]
    at = where(thing.place, w)
    w.rng.shuffle(ways)
    said = (way(thing) for way in ways if [way(t) for t in scene.things].count(way(thing)) == 1)
    return next(said, None)


def change(scene: Scene, w: Wording, kind: str) -> Change | None:
    """An edit of a kind (see KINDS, but for transfer and several); None where the scene does not allow it.

    Returns:
        The instruction, and the scene it leads to.
    """
    made = _MAKERS[kind](scene, w)
    return made if made and problem(made[1]) is None and made[1] != scene else None


def _one(scene: Scene, w: Wording) -> tuple[Thing, str] | None:
    if not scene.things:
        return None
    old = w.rng.choice(scene.things)
    meant = reference(scene, old, w)
    return (old, meant) if meant else None


def _with(scene: Scene, old: Thing, *new: Thing) -> Scene:
    return scene.with_things((*(thing for thing in scene.things if thing is not old), *new))


def _recolour(scene: Scene, w: Wording) -> Change | None:
    if not (found := _one(scene, w)):
        return None
    old, meant = found
    colour = w.rng.choice([c for c in scene.colours() if c not in {t.colour for t in scene.at(old.place)}])
    after = _with(scene, old, replace(old, colour=colour))
    if w.often(0.1) and [t.shape for t in scene.at(old.place)] == [old.shape]:
        return chinese.asked(
            "edits", "recolour", w.rng, colour=chinese.words()["colours"][colour], **chinese.named(old)
        ), after
    return w.pick(
        (
            f"make the {meant} {colour}",
            f"change the colour of the {meant} to {colour}",
            f"the {meant} should be {colour}",
            f"paint the {meant} {colour}",
        ),
        (f"turn the {meant} {colour}", f"I want the {meant} to be {colour}"),
    ), after


def _replace(scene: Scene, w: Wording) -> Change | None:
    if not (found := _one(scene, w)):
        return None
    old, meant = found
    shape = w.rng.choice([shape for shape in SHAPES if shape != old.shape])
    said = a(w.rng.choice(OTHER_SHAPES.get(shape, (shape,))))
    return w.pick(
        (f"replace the {meant} with {said}", f"make {said} of the {meant}", f"change the {meant} into {said}"),
        (f"turn the {meant} into {said}", f"{said} instead of the {meant}"),
    ), _with(scene, old, replace(old, shape=shape))


def _resize(scene: Scene, w: Wording) -> Change | None:
    if not (found := _one(scene, w)):
        return None
    old, meant = found
    if old.fill != "plain" or len(scene.at(old.place)) > 1:
        return None
    new = replace(old, size="small" if old.size == "large" else "large")
    more = "smaller" if new.size == "small" else "larger"
    return w.pick(
        (f"make the {meant} {new.size}", f"make the {meant} {more}", f"change the size of the {meant} to {new.size}"),
        (f"the {meant} should be {more}",),
    ), _with(scene, old, new)


def _refill(scene: Scene, w: Wording) -> Change | None:
    if not (found := _one(scene, w)) or found[0].size == "small":
        return None
    old, meant = found
    fill = w.rng.choice([fill for fill in FILLS if fill != old.fill])
    return w.pick(
        (f"make the {meant} {fill}", f"the {meant} should be {fill}", f"change the fill of the {meant} to {fill}"),
        (f"turn the {meant} {fill}",),
    ), _with(scene, old, replace(old, fill=fill))


def _add(scene: Scene, w: Wording) -> Change | None:
    free = scene.free()
    if len(scene.things) == 6 or not free:
        return None
    new = sample_thing(w.rng, scene.colours(), w.rng.choice(free))
    said, at = a(noun(new, w)), where(new.place, w)
    return w.pick(
        (f"add {said} {at}", f"put {said} {at}", f"draw {said} {at}", f"{at} add {said}"),
        (f"there should be {said} {at}", f"I want {said} {at}"),
    ), scene.with_things((*scene.things, new))


def _remove(scene: Scene, w: Wording) -> Change | None:
    if not (found := _one(scene, w)) or len(scene.at(found[0].place)) > 1:
        return None
    old, meant = found
    if w.often(0.1) and w.rng:
        return chinese.asked("edits", "remove", w.rng, **chinese.named(old)), _with(scene, old)
    return w.pick(
        (f"remove the {meant}", f"take away the {meant}", f"take the {meant} out", f"without the {meant}"),
        (f"take the {meant} away", f"the {meant} should not be there"),
    ), _with(scene, old)


def _move(scene: Scene, w: Wording) -> Change | None:
    if not (found := _one(scene, w)) or len(scene.at(found[0].place)) > 1:
        return None
    old, meant = found
    place = w.rng.choice(scene.free())
    towards = w.rng.choice(TOWARDS[place])
    return w.pick(
        (f"move the {meant} {towards}", f"put the {meant} {where(place, w)}"), (f"the {meant} should move {towards}",)
    ), _with(scene, old, replace(old, place=place))


def _swap(scene: Scene, w: Wording) -> Change | None:
    alone = [thing for thing in scene.things if len(scene.at(thing.place)) == 1]
    if len(alone) < 2:
        return None
    first, second = w.rng.sample(alone, 2)
    one, other = reference(scene, first, w), reference(scene, second, w)
    if not one or not other:
        return None
    rest = [thing for thing in scene.things if thing is not first and thing is not second]
    moved = replace(first, place=second.place), replace(second, place=first.place)
    return w.pick(
        (f"swap the {one} and the {other}", f"exchange the {one} with the {other}"),
        (f"the {one} and the {other} swap places",),
    ), scene.with_things((*rest, *moved))


def _background(scene: Scene, w: Wording) -> Change | None:
    used = {thing.colour for thing in scene.things} | ({scene.sign.ink} if scene.sign else set())
    free = [b for b in BACKGROUNDS if b != scene.background and not used & set(ground_colours(b))]
    if not free:
        return None
    new = w.rng.choice(free)
    if w.often(0.1):
        return chinese.asked("edits", "background", w.rng, ground=chinese.ground(new)), replace(scene, background=new)
    said = f"the {new}" if new in ("sea", "night") else a(new) if new in SCENERY else new
    return w.pick(
        (f"change the background to {said}", f"make the background {said}", f"the background should be {said}"),
        (f"turn the background into {said}", f"I want {said} behind everything"),
    ), replace(scene, background=new)


def _text(scene: Scene, w: Wording) -> Change | None:
    if not (sign := scene.sign):
        return None
    if w.often(0.3):
        ink = w.rng.choice(scene.inks())
        return w.pick(
            (f"make the letters {ink}", f"write the text in {ink}", f"change the colour of the text to {ink}"),
            (f"turn the letters {ink}",),
        ), replace(scene, sign=replace(sign, ink=ink))
    text = sample_word(w.rng)
    after = replace(scene, sign=replace(sign, text=text))
    if w.often(0.1):
        return chinese.asked("edits", "sign", w.rng, text=text), after
    return w.pick(
        (
            f'change the text to "{text}"',
            f'change "{sign.text}" to "{text}"',
            f'write "{text}" instead of "{sign.text}"',
            f'the sign should say "{text}"',
            f'replace the word "{sign.text}" with "{text}"',
        ),
        (f'turn the text into "{text}"', f'make the sign say "{text}"'),
    ), after


def _write(scene: Scene, w: Wording) -> Change | None:
    places = [place for place in scene.free() if place in SIGNED]
    if scene.sign or not places:
        return None
    sign = sample_sign(w.rng, scene.inks(), places)
    at = where(sign.place, w)
    return w.pick(
        (f'write "{sign.text}" in {sign.ink} {at}', f'add the word "{sign.text}" in {sign.ink} {at}'),
        (f'{at} write "{sign.text}" in {sign.ink} letters',),
    ), replace(scene, sign=Sign(sign.text, sign.ink, sign.place))


def _erase(scene: Scene, w: Wording) -> Change | None:
    if not scene.sign:
        return None
    return w.pick(
        ("remove the text", f'remove the word "{scene.sign.text}"', "take away the letters", "without the text"),
        ("take the text away",),
    ), replace(scene, sign=None)


def _cover(scene: Scene, w: Wording) -> Change | None:
    """One thing in front of another, or behind it."""
    alone = [thing for thing in scene.things if len(scene.at(thing.place)) == 1]
    if not alone or len(scene.things) == 6:
        return None
    old = w.rng.choice(alone)
    meant = reference(scene, old, w)
    if not meant:
        return None
    if old.size == "large":
        new = second(old, w.rng, scene.colours())
        said = a(noun(new, w))
        return w.pick(
            (
                f"put {said} in front of the {meant}",
                f"add {said} over the {meant}",
                f"draw {said} in front of the {meant}",
            ),
            (f"in front of the {meant} add {said}",),
        ), _with(scene, old, old, new)
    colours = [colour for colour in scene.colours() if colour != old.colour]
    new = sample_thing(w.rng, colours, old.place, "large")
    said = a(noun(new, w))
    return w.pick(
        (f"put {said} behind the {meant}", f"add {said} behind the {meant}"), (f"behind the {meant} add {said}",)
    ), (_with(scene, old, new, replace(old, front=True)))


def _touch(scene: Scene, w: Wording) -> Change | None:
    """A small thing beside another small one, touching it."""
    small = [thing for thing in scene.things if thing.size == "small" and len(scene.at(thing.place)) == 1]
    if not small or len(scene.things) == 6:
        return None
    old = w.rng.choice(small)
    new = second(old, w.rng, scene.colours())
    said, meant = a(noun(new, w)), reference(scene, old, w)
    if not meant:
        return None
    return w.pick(
        (f"add {said} that touches the {meant}", f"put {said} beside the {meant} so that they touch"),
        (f"let {said} touch the {meant}",),
    ), _with(scene, old, old, new)


def transfer(scene: Scene, w: Wording) -> tuple[str, Scene, Scene] | None:
    """An object of a second picture put into the first: the instruction, the second picture, the result."""
    free = scene.free()
    if len(scene.things) == 6 or not free:
        return None
    new = sample_thing(w.rng, scene.colours(), w.rng.choice(free))
    second = sample_scene(w.rng, count=1, split=None, grids=(scene.grid,))
    second = replace(second.with_things((new,)), sign=None)
    if problem(second):
        return None
    which = w.rng.choice(("object", new.shape))
    words = w.pick(
        (
            f"put the {which} of the second image into the first",
            f"add the {which} from the second picture to the first",
        ),
        (f"the first image with the {which} of the second",),
    )
    return words, second, scene.with_things((*scene.things, new))


_MAKERS = {
    "recolour": _recolour,
    "replace": _replace,
    "resize": _resize,
    "refill": _refill,
    "add": _add,
    "remove": _remove,
    "move": _move,
    "swap": _swap,
    "background": _background,
    "text": _text,
    "write": _write,
    "erase": _erase,
    "cover": _cover,
    "touch": _touch,
}
SIMPLE = tuple(_MAKERS)


def several(scene: Scene, w: Wording) -> Change | None:
    """Two or three changes at once."""
    said, now = [], scene
    for kind in w.rng.sample(SIMPLE, w.rng.choice((2, 2, 3))):
        if made := change(now, w, kind):
            words, now = made
            said.append(words)
    if len(said) < 2 or not all(words.isascii() for words in said):
        return None
    return w.rng.choice((", then ", " and ")).join(said), now


def only_place(before: Scene, after: Scene) -> str | None:
    """The one place that an edit is about, for a mask; None where it is about more."""
    places = [place for place in PLACES if before.at(place) != after.at(place)]
    same = before.background == after.background and before.sign == after.sign
    return places[0] if same and len(places) == 1 else None


assert all(colour in COLOURS for colours in SCENERY.values() for colour in colours if colour != "sky")
