"""The shipped graphs for the miniature: prompts, pictures and sizes of its own world, and what has to come out."""

import copy
from dataclasses import dataclass, replace

from dev.miniature.texts import description, name
from dev.miniature.world import Scene, Thing

CHECKPOINT = "miniature"  # as the loader lists it; it comes with the pack
SIDE = 256  # pixels of its pictures each way

FIRST = Scene(
    (Thing("circle", "black", "large", "left"), Thing("square", "orange", "small", "right")), "purple", (6, 8)
)
SECOND = Scene((Thing("star", "yellow", "small", "above"),), "green")
PICTURES = {"example.png": FIRST, "example-2.png": SECOND}  # in the host's input folder
# The first with its left half painted over: transparent, as the host's mask editor leaves it.
MASKED, MASK = "masked.png", (0, 0, 128, 192)  # file, and left, top, right, bottom in pixels
PAINTED = ("edit-in-a-mask", "edit-a-part")  # workflows that take a picture with a part painted over
LORA = "random.safetensors"  # in the host's loras folder: small random updates of the miniature's turbo decoder
REFINED = 0.05  # denoise of an enlarged picture: the miniature has seen pictures of one size alone
ENLARGED = {"larger": 2}  # workflows whose pictures are so many times the size of their scene

_PAIR = Scene((Thing("star", "blue", "large", "above"), Thing("diamond", "red", "small", "below")), "black")
# Enlarged, other colours get a fringe of a third one where they meet the ground.
_REDS = Scene((Thing("star", "red", "large", "above"), Thing("diamond", "red", "small", "below")), "black")
_EDITED = _PAIR.with_things((replace(_PAIR.things[0], colour="yellow"), _PAIR.things[1]))
_TRIO = Scene(
    (
        Thing("square", "green", "small", "left"),
        Thing("triangle", "purple", "large", "right"),
        Thing("star", "orange", "small", "below"),
    ),
    "white",
)
_HERO = Thing("diamond", "purple", "large", "left")
_CIRCLE, _SQUARE = FIRST.things
_YELLOW = FIRST.with_things((replace(_CIRCLE, colour="yellow"), _SQUARE))

_BESIDE = Scene((Thing("circle", "yellow", "small", "left"), Thing("square", "green", "large", "right")), "blue")
_ALONE = Scene((Thing("triangle", "red", "large", "centre"),), "yellow")


def _drawn(scene: Scene) -> str:
    first, second = scene.things
    return f"a {name(first)} above a {name(second)} on a {scene.background} background"


# Workflow -> what it asks.
PROMPTS = {
    "text-to-image": _drawn(_PAIR),
    "thinking-text-to-image": "a small green square on the left, a large purple triangle on the right and a small "
    "orange star at the bottom",
    "edit": "make the circle yellow",
    "edit-a-part": "make the circle yellow",
    "outpaint": "a large black circle to the left of a small orange square on a purple background",
    "four-variations": "a large red triangle in the centre on a yellow background",
    "edit-two-references": "put the star of the second image into the first",
    "image-qa": "Describe the picture.",
    "sprint-side-by-side": "a small yellow circle to the left of a large green square on a blue background",
    "turbo-and-normal": _drawn(_PAIR),
    "decoder-with-ksampler": _drawn(_PAIR),
    "edit-keeps-the-photo": "make the circle yellow",
    "edit-in-a-mask": "make the circle yellow",
    "larger": _drawn(_REDS),
    "with-lora": _drawn(_PAIR),
    "story": "Tell a story: a large purple diamond on the left on a white background moves to the centre and then to "
    "the right.",
}
# Workflow -> what its saved pictures show, in their order.
SHOWN = {
    "text-to-image": [_PAIR],
    "thinking-text-to-image": [_TRIO],
    "edit": [_YELLOW],
    "edit-a-part": [_YELLOW],
    "outpaint": [replace(FIRST, grid=(8, 8))],
    "four-variations": [_ALONE] * 4,
    "edit-two-references": [FIRST.with_things((*FIRST.things, *SECOND.things))],
    "image-qa": [],
    "sprint-side-by-side": [_BESIDE, _BESIDE],
    "turbo-and-normal": [_PAIR, _PAIR],
    "decoder-with-ksampler": [_PAIR, _PAIR],
    "edit-keeps-the-photo": [_YELLOW],
    "edit-in-a-mask": [_YELLOW],
    "larger": [_REDS],
    "with-lora": [_PAIR],
    "miniature": [_PAIR, _EDITED],
    "story": [Scene((replace(_HERO, place=place),), "white") for place in ("left", "centre", "right")],
}
# Workflow -> what its text outputs say.
SAID = {
    "thinking-text-to-image": "one square, green, small, left; one triangle, purple, large, right; one star, orange, "
    "small, below; white background",
    "image-qa": description(FIRST),
    "miniature": description(_EDITED),
    "story": "First, the diamond is on the left.\n\n[image 1]\n\nThen, the diamond is in the centre.\n\n[image 2]\n\n"
    "At last, the diamond is on the right.\n\n[image 3]\n\nThe end.",
}


@dataclass(frozen=True)
class Tried:
    """What the note of a workflow that takes pictures proposes for the miniature, and what has to come out.

    Attributes:
        pictures: what is on them; the first is what the template `miniature` draws.
        prompt: what to ask.
        shown: the picture that comes out, if any.
        said: the text that comes out, if any.
        drawn: the prompt by which that template draws the second of two pictures.
    """

    pictures: tuple[Scene, ...]
    prompt: str
    shown: Scene | None = None
    said: str = ""
    drawn: str = ""


_SECOND = Scene((Thing("circle", "green", "small", "left"),), "white")
TRIED = {
    "edit": Tried((_PAIR,), "make the blue star yellow", _EDITED),
    "edit-two-references": Tried(
        (_PAIR, _SECOND),
        "put the circle of the second image into the first",
        _PAIR.with_things((*_SECOND.things, *_PAIR.things)),
        drawn="a small green circle on the left on a white background",
    ),
    "image-qa": Tried((_PAIR,), "Describe the picture.", said=description(_PAIR)),
    "edit-keeps-the-photo": Tried((_PAIR,), "make the blue star yellow", _EDITED),
    "edit-in-a-mask": Tried((_PAIR,), "make the blue star yellow", _EDITED),
    "edit-a-part": Tried((_PAIR,), "make the blue star yellow", _EDITED),
}
_ASKED = {
    "LLaDAUniSample": "prompt",
    "LLaDAUniVary": "prompt",
    "LLaDAUniInterleave": "instruction",
    "LLaDAUniImageQA": "question",
}


def for_miniature(workflow: str, graph: dict, tried: bool = False) -> dict:
    """A shipped API graph that asks the miniature for what it knows.

    Args:
        workflow: the graph's name.
        graph: node id -> {"class_type", "inputs"}.
        tried: as the workflow's note proposes it, with the pictures of `TRIED`.
    """
    graph = copy.deepcopy(graph)
    if workflow not in PROMPTS:  # made for it
        return graph
    pictures = iter(tried_files(workflow) if tried else (MASKED,) if workflow in PAINTED else PICTURES)
    prompt = TRIED[workflow].prompt if tried else PROMPTS[workflow]
    for node in graph.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "LLaDAUniLoader":
            inputs["checkpoint"] = CHECKPOINT
        elif kind == "LoadImage":
            inputs["image"] = next(pictures)
        elif kind == "LoraLoaderModelOnly":
            inputs["lora_name"] = LORA
        elif kind == "KSampler" and workflow in ENLARGED and inputs["denoise"] < 1:
            inputs["denoise"] = REFINED
        elif kind == "LLaDAUniSample":
            inputs |= {"width": SIDE, "height": SIDE}
        elif kind == "LLaDAUniPadTokens":
            inputs |= {"left": 0, "top": 32, "right": 0, "bottom": 32}  # to a picture as large as it knows
        if kind in _ASKED:
            inputs[_ASKED[kind]] = prompt
    return graph


def tried_files(workflow: str) -> list[str]:
    """The files in a host's input folder that hold the pictures of `TRIED`."""
    return [f"tried-{workflow}-{number}.png" for number in range(1, len(TRIED[workflow].pictures) + 1)]
