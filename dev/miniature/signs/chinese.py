"""Prompts, questions and edits in Chinese; the words are in chinese.json."""

import json
import random
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

from .world import PLACES, SCENERY, Scene, Thing, layout


@cache
def words() -> dict:
    """The words and forms."""
    return json.loads((Path(__file__).parent / "chinese.json").read_text(encoding="utf-8"))


def _noun(thing: Thing, rng: random.Random, count: int = 1) -> str:
    w = words()
    sized = thing.size == "small" or rng.random() < 0.4
    return rng.choice(w["thing" if sized else "plain"]).format(
        number=w["numbers"][count],
        colour=w["colours"][thing.colour],
        fill=w["fills"][thing.fill],
        size=w["sizes"][thing.size],
        shape=w["shapes"][thing.shape],
    )


def ground(background: str) -> str:
    """A background's name."""
    return words()["scenery"][background] if background in SCENERY else words()["colours"][background]


def caption(scene: Scene, rng: random.Random) -> str:
    """A prompt that asks for the scene; what it leaves out has the defaults of `texts.caption`."""
    w = words()
    parts = []
    singles = [scene.at(place)[0] for place in PLACES if len(scene.at(place)) == 1]
    pairs = [scene.at(place) for place in PLACES if len(scene.at(place)) == 2]
    kinds = Counter(replace(thing, place="") for thing in singles)
    for kind, count in kinds.items():
        places = tuple(thing.place for thing in singles if replace(thing, place="") == kind)
        what = _noun(kind, rng, count)
        only = len(kinds) == 1 and not pairs and not scene.sign
        if only and places == layout(count) and rng.random() < 0.5:
            parts.append(w["row"].format(what=what) if count == 3 and rng.random() < 0.4 else what)
        elif count == 1:
            parts.append(rng.choice(w["placed"]).format(where=w["places"][places[0]], what=what))
        else:
            parts.append(rng.choice(w["placed"]).format(where=w["and"].join(w["places"][p] for p in places), what=what))
    for back, front in pairs:
        at = {"where": w["places"][back.place], "back": _noun(back, rng), "front": _noun(front, rng)}
        parts.append(rng.choice(w["touching" if front.touching else "pair"]).format(**at))
    rng.shuffle(parts)
    if sign := scene.sign:
        at = {"where": w["places"][sign.place], "text": sign.text, "ink": w["colours"][sign.ink]}
        parts.append(rng.choice(w["sign"]).format(**at))
    if scene.background != "white" or rng.random() < 0.5:
        parts.insert(rng.choice((0, len(parts))), rng.choice(w["ground"]).format(ground=ground(scene.background)))
    return rng.choice(w["openings"]) + w["comma"].join(parts) + (w["stop"] if rng.random() < 0.3 else "")


def asked(group: str, kind: str, rng: random.Random, **named: str) -> str | None:
    """A question or an edit of a kind; None where it is not said in Chinese."""
    forms = words()[group].get(kind)
    return forms and rng.choice(forms).format(**named)


def named(thing: Thing) -> dict[str, str]:
    """Where a thing is and what shape it has, in words."""
    return {"where": words()["places"][thing.place], "shape": words()["shapes"][thing.shape]}
