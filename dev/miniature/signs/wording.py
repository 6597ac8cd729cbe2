"""Words for the parts of scenes, in many forms; some forms are kept from training, though not the words they are of."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .world import Sign, Thing

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
LARGE, SMALL = ("large", "big"), ("small", "little", "tiny")
FILLED = {
    "plain": ("",),
    "striped": ("striped", "striped", "stripy"),
    "hollow": ("hollow", "hollow", "outlined", "empty"),
}
WITH_FILL = {"striped": ("with stripes", "that has stripes"), "hollow": ("drawn as an outline", "that is empty inside")}
OTHER_SHAPES = {"cross": ("cross", "cross", "plus sign"), "diamond": ("diamond", "diamond", "rhombus")}
WHERE = {
    "top left": (
        ("in the top left corner", "at the top left", "at the upper left", "top left"),
        ("in the upper left",),
    ),
    "top": (("at the top", "at the top in the middle", "at the upper edge", "on top"), ("in the middle at the top",)),
    "top right": (
        ("in the top right corner", "at the top right", "at the upper right", "top right"),
        ("in the upper right",),
    ),
    "left": (("on the left", "at the left", "on the left side", "at the left edge"), ("to the left", "left")),
    "centre": (("in the centre", "in the middle", "in the center", "at the centre"), ("at the middle", "centre")),
    "right": (("on the right", "at the right", "on the right side", "at the right edge"), ("to the right", "right")),
    "bottom left": (
        ("in the bottom left corner", "at the bottom left", "at the lower left", "bottom left"),
        ("in the lower left",),
    ),
    "bottom": (
        ("at the bottom", "at the bottom in the middle", "at the lower edge", "below"),
        ("in the middle at the bottom",),
    ),
    "bottom right": (
        ("in the bottom right corner", "at the bottom right", "at the lower right", "bottom right"),
        ("in the lower right",),
    ),
}
GROUNDS = {
    "meadow": (
        ("in a meadow", "on a meadow", "in a green meadow under the sky", "with a meadow behind"),
        ("a meadow",),
    ),
    "beach": (("at the beach", "on a beach", "on a yellow beach under the sky", "with a beach behind"), ("a beach",)),
    "sea": (("at sea", "by the sea", "with the blue sea under the sky", "with the sea behind"), ("the sea",)),
    "night": (("at night", "in the night sky", "under the stars of the night", "with a night sky behind"), ("night",)),
}


@dataclass(frozen=True)
class Wording:
    """Chooses forms: those of training, or as often as can be those that training never has.

    Attributes:
        rng: the only source of chance.
        new: whether the forms kept from training are wanted.
    """

    rng: random.Random
    new: bool = False

    def pick(self, known: Sequence[str], new: Sequence[str] = ()) -> str:
        """One of the forms."""
        return self.rng.choice(new if self.new and new else known)

    def often(self, share: float) -> bool:
        """True in a share of the cases."""
        return self.rng.random() < share


def a(noun: str) -> str:
    """A noun with its article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def listing(parts: Sequence[str]) -> str:
    """ "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def plural(noun: str, count: int) -> str:
    """ "circles", "crosses"; the noun itself for one."""
    return noun if count == 1 else noun + ("es" if noun.endswith("s") else "s")


def name(thing: Thing) -> str:
    """The one full form: "large striped red circle"; "plain" is left out."""
    fill = "" if thing.fill == "plain" else thing.fill + " "
    return f"{thing.size} {fill}{thing.colour} {thing.shape}"


def short(thing: Thing) -> str:
    """ "red circle"."""
    return f"{thing.colour} {thing.shape}"


def noun(thing: Thing, w: Wording, count: int = 1, sized: float = 0.45) -> str:
    """A thing in one of many forms, without its article. A size that is not said is large.

    Args:
        thing: what is meant.
        w: of the choice.
        count: of them.
        sized: how often "large" is said.
    """
    shape = plural(w.rng.choice(OTHER_SHAPES.get(thing.shape, (thing.shape,))), count)
    size = w.pick(SMALL) if thing.size == "small" else w.pick(LARGE) if w.often(sized) else ""
    after = ""
    if thing.fill != "plain" and w.often(0.8 if w.new else 0.25):
        fill, after = "", w.pick(WITH_FILL[thing.fill])
        if count > 1:
            after = after.replace("that has", "that have").replace("that is", "that are")
            after = after.replace("an outline", "outlines")
    else:
        fill = w.pick(FILLED[thing.fill])
        fill = "plain" if not fill and w.often(0.06) else fill
    words = [size, fill, thing.colour]
    if w.often(0.15) or (w.new and w.often(0.5)):
        words = [size, thing.colour, fill]
    return " ".join(filter(None, [*words, shape, after]))


def where(place: str, w: Wording) -> str:
    """ "in the top left corner"."""
    return w.pick(*WHERE[place])


def ground(background: str, w: Wording) -> tuple[str, bool]:
    """A background in words that stand behind a thing ("on a red background"), and whether they may stand before it."""
    if background in GROUNDS:
        return w.pick(GROUNDS[background][0]), True
    colour = background
    return w.pick(
        (
            f"on {a(colour)} background",
            f"on {a(colour)} background",
            f"against {a(colour)} background",
            f"in front of {a(colour)} background",
            f"with {a(colour)} background",
            f"on {colour}",
        ),
        (f"with {colour} behind", f"with the background in {colour}"),
    ), True


def written(sign: Sign, w: Wording) -> str:
    """A sign as a thing: 'the word "CAT" in red'."""
    kind = "number" if sign.text.isdigit() else "word"
    quoted = w.pick((f'"{sign.text}"', sign.text, f"'{sign.text}'"))
    ink = w.pick((f" in {sign.ink}", f" in {sign.ink} letters", f" written in {sign.ink}"), (f", {sign.ink},",))
    if w.often(0.2):
        ink, kind = "", f"{sign.ink} {kind}"
    return f"the {kind} {quoted}{ink}".rstrip(",")
