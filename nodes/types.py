"""The socket types, and what several nodes share of their inputs."""

import functools
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

from ..llada_core.checks import MAX_SEED
from ..llada_core.options import IMAGE_STEPS, MAX_GUIDANCE, MAX_STEPS, Guidance

CATEGORY = "LLaDA-Uni"

Model = io.Custom("LLADA_UNI")
Tokens = io.Custom("LLADA_TOKENS")
SamplingOptions = io.Custom("LLADA_SAMPLING")
SprintOptions = io.Custom("LLADA_SPRINT")

MODEL_TIP = "A checkpoint from Load LLaDA-Uni."
SPRINT_TIP = "SPRINT Options: fewer rounds by looking at less of what came before. Leave empty for plain sampling."
SAMPLING_TIP = "Sampling Options. Leave empty for the model's defaults."


def model_input() -> io.Input:
    """The socket that takes a loaded checkpoint."""
    return Model.Input("model", tooltip=MODEL_TIP)


def tokens_input(name: str, tooltip: str, optional: bool = False) -> io.Input:
    """A socket that takes image tokens."""
    return Tokens.Input(name, optional=optional, tooltip=tooltip)


def sampling_input() -> io.Input:
    """The optional socket for Sampling Options."""
    return SamplingOptions.Input("sampling", optional=True, tooltip=SAMPLING_TIP)


def sprint_input() -> io.Input:
    """The optional socket for SPRINT Options."""
    return SprintOptions.Input("sprint", optional=True, tooltip=SPRINT_TIP)


def prompt_input(tooltip: str) -> io.Input:
    """What to draw, in several lines."""
    return io.String.Input("prompt", multiline=True, dynamic_prompts=True, tooltip=tooltip)


def steps_input() -> io.Input:
    """The rounds of a block of image tokens."""
    return io.Int.Input("steps", default=IMAGE_STEPS, min=1, max=MAX_STEPS, tooltip="Rounds a block may take.")


def guidance_input(tooltip: str) -> io.Input:
    """The strength of guidance by text."""
    return io.Float.Input("guidance", default=Guidance.text, min=0.0, max=MAX_GUIDANCE, step=0.1, tooltip=tooltip)


def seed_input(tooltip: str) -> io.Input:
    """A seed that the front end can change after each run."""
    return io.Int.Input("seed", default=0, min=0, max=MAX_SEED, control_after_generate=True, tooltip=tooltip)


def folding(*names: str) -> Callable[[Callable[[Any], io.Schema]], Callable[[Any], io.Schema]]:
    """For define_schema: the front end folds these inputs away until they are asked for, as few people change them.

    ComfyUI 0.3.64 takes no argument for it, but hands on what stands in an input's extra_dict.
    """

    def decorate(define: Callable[[Any], io.Schema]) -> Callable[[Any], io.Schema]:
        @functools.wraps(define)
        def defined(cls) -> io.Schema:
            schema = define(cls)
            inputs = {given.id: given for given in schema.inputs}
            for name in names:
                inputs[name].extra_dict = {**inputs[name].extra_dict, "advanced": True}
            return schema

        return defined

    return decorate


def found_as(*words: str) -> dict[str, list[str]]:
    """A schema's further words that find its node in the front end's search, where the host's schemas have such."""
    return {"search_aliases": list(words)} if "search_aliases" in io.Schema.__dataclass_fields__ else {}
