"""Diffusion-LLM Sample."""

import logging
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from comfy_api.latest import io

from ..llada_core.checks import MAX_SIDE, PIXELS, check_count, check_seed, check_size, check_text
from ..llada_core.image_tokens import ImageTokens, join
from ..llada_core.options import MAX_BATCH
from . import host
from .lists import first, one_by_one
from .options import SamplingChoice
from .sockets import ABSENT, check_received, complaint
from .types import (
    CATEGORY,
    Tokens,
    found_as,
    guidance_input,
    model_input,
    prompt_input,
    sampling_input,
    seed_input,
    sprint_input,
    steps_input,
    tokens_input,
)

log = logging.getLogger(__name__)


class Sample(io.ComfyNode):
    """Diffusion-LLM Sample."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs; the host reads this."""
        return io.Schema(
            node_id="LLaDAUniSample",
            display_name="Diffusion-LLM Sample",
            category=CATEGORY,
            **found_as("text to image", "t2i", "image edit", "draw", "prompt"),
            description="Writes image tokens from a prompt, block by block. With references connected it edits them; "
            "with a mask it draws a part anew and keeps the rest.",
            is_input_list=True,
            inputs=[
                model_input(),
                prompt_input("What to draw; with references, what to change."),
                io.Int.Input(
                    "width",
                    default=1024,
                    min=PIXELS,
                    max=MAX_SIDE,
                    step=PIXELS,
                    tooltip="Width of the decoded picture in pixels. Not used with references.",
                ),
                io.Int.Input(
                    "height",
                    default=1024,
                    min=PIXELS,
                    max=MAX_SIDE,
                    step=PIXELS,
                    tooltip="Height of the decoded picture in pixels. Not used with references.",
                ),
                steps_input(),
                guidance_input(
                    "How strongly to follow the prompt. 2 for drawing, 4 for editing; 1 turns it off and "
                    "halves the work."
                ),
                seed_input("Draws at a temperature above 0 (Sampling Options). At temperature 0 it changes nothing."),
                io.Boolean.Input(
                    "thinking",
                    default=False,
                    tooltip="Plan the picture in words first. Slower, better at prompts that need knowledge. Not with "
                    "references.",
                ),
                tokens_input(
                    "references",
                    "Images to edit, from SigLIP-VQ Encode (purpose edit). The first gives the size of the result. Not "
                    "with thinking.",
                    optional=True,
                ),
                sampling_input(),
                sprint_input(),
                tokens_input(
                    "tokens",
                    "With a mask: the image to start from, which gives the size. Without it the first reference.",
                    optional=True,
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="What to draw anew: every token that it touches. All others stay as they are. It is of the "
                    "picture that tokens or the first reference show.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=MAX_BATCH,
                    optional=True,
                    tooltip="Images drawn at once; image i uses seed + i. At temperature 0 all would be equal, so one "
                    "is drawn for all.",
                ),
            ],
            outputs=[
                Tokens.Output(
                    display_name="tokens",
                    is_output_list=True,
                    tooltip="The drawn images, for Semantic-Token Decode; of a list of prompts, a list.",
                ),
                io.String.Output(
                    display_name="thinking", is_output_list=True, tooltip="The plan, when thinking is on."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls,
        input_types=None,
        model=ABSENT,
        prompt=None,
        width=None,
        height=None,
        references=ABSENT,
        sampling=ABSENT,
        sprint=ABSENT,
        tokens=ABSENT,
        mask=ABSENT,
    ) -> bool | str:
        """Refuse an empty prompt and impossible sizes before anything runs; linked values are checked when known."""
        sockets = {"model": model, "references": references, "sampling": sampling, "sprint": sprint}
        sockets |= {"tokens": tokens, "mask": mask}
        prompt, width, height = first(prompt), first(width), first(height)

        def check():
            if prompt is not None:
                check_text("prompt", prompt)
            check_size(PIXELS if height is None else height, PIXELS if width is None else width)

        return complaint(cls, first(input_types), {name: first(value) for name, value in sockets.items()}, check)

    @classmethod
    def execute(
        cls,
        model,
        prompt,
        width,
        height,
        steps,
        guidance,
        seed,
        thinking,
        references=None,
        sampling=None,
        sprint=None,
        tokens=None,
        mask=None,
        batch_size=1,
    ) -> io.NodeOutput:
        """Draw or edit; every input is a list, and what comes several times is drawn in as few batches as can be."""
        sockets = {"model": model, "references": references, "sampling": sampling, "sprint": sprint}
        sockets |= {"tokens": tokens, "mask": mask}
        widgets = {"prompt": prompt, "width": width, "height": height, "steps": steps, "guidance": guidance}
        widgets |= {"seed": seed, "thinking": thinking, "batch_size": batch_size}
        runs = one_by_one(sockets | widgets)
        for run in runs:
            check_received(cls, **{name: run[name] for name in sockets})
        results: list[tuple[ImageTokens, str]] = []
        for _, group in groupby(runs, key=_options):
            results += cls._draw(list(group))
        return io.NodeOutput([drawn for drawn, _ in results], [plan for _, plan in results])

    @classmethod
    def _draw(cls, runs: list[dict[str, Any]]) -> list[tuple[ImageTokens, str]]:
        """Runs whose options agree, in one batch."""
        run = runs[0]
        model, size = run["model"], run["batch_size"]
        check_count("batch_size", size, 1, MAX_BATCH)
        for one in runs:
            check_seed(one["seed"])
        choice = run["sampling"] or SamplingChoice()
        chance = choice.sampling.temperature > 0
        count = size if chance else 1
        reporter = host.Reporter(cls.hidden, model)
        keys = [host.key_of({name: run[name] for name in run if name not in ("model", "seed")}) for run in runs]
        known = [] if chance else [found for key in keys if (found := model.recent.get(key)) is not None]
        if len(known) == len(runs):
            log.info("LLaDA-Uni sample: as drawn before: at temperature 0 the seed changes nothing")
            reporter.finish("As drawn before: at temperature 0 the seed changes nothing.")
            return known
        asked = [(one, index) for one in runs for index in range(count)]
        drawn = model.generate(
            [one["prompt"] for one, _ in asked],
            [one["height"] for one, _ in asked],
            [one["width"] for one, _ in asked],
            references=[one["references"] for one, _ in asked],
            thinking=run["thinking"],
            sampling=replace(choice.sampling, steps=run["steps"]),
            guidance=choice.guidance(run["guidance"]),
            sprint=run["sprint"],
            seed=[(one["seed"] + index) % 2**64 for one, index in asked],
            progress=reporter,
            tokens=[one["tokens"] for one, _ in asked],
            mask=[_mask_of(one["mask"], index, count) for one, index in asked],
        )
        usage = sum((one.usage for one in drawn[1:]), drawn[0].usage)
        equal = f" At temperature 0 all {size} are equal: drawn once." if size > count else ""
        log.info("LLaDA-Uni sample: %s.%s", usage, equal)
        reporter.finish(f"{usage}{'.' if equal else ''}{equal}")
        each = [drawn[at : at + count] for at in range(0, len(drawn), count)]
        results = [
            (join([one.tokens for one in made] * (size // count)), "\n\n".join(one.thinking for one in made))
            for made in each
        ]
        if not chance:
            for key, result in zip(keys, results, strict=True):
                model.recent.keep(key, result)
        return results


def _options(run: dict[str, Any]) -> tuple:
    """What must agree for runs to be one batch: all but prompt, size, seed and images."""
    own = ("prompt", "height", "width", "seed", "references", "tokens", "mask")
    options = {name: value for name, value in run.items() if name not in (*own, "model")}
    return run["references"] is not None, id(run["model"]), host.key_of(options)


def _mask_of(mask: torch.Tensor | None, index: int, count: int) -> torch.Tensor | None:
    """The mask of image `index` of a batch: its own where there are as many."""
    return mask[index] if mask is not None and mask.ndim == 3 and len(mask) == count else mask
