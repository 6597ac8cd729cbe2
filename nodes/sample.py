"""Diffusion-LLM Sample."""

import logging
from dataclasses import replace

from comfy_api.latest import io

from ..llada_core.checks import MAX_SIDE, PIXELS, check_size, check_text
from ..llada_core.options import IMAGE_STEPS, MAX_GUIDANCE, MAX_STEPS, Guidance
from . import host
from .options import SamplingChoice
from .sockets import ABSENT, check_received, complaint
from .types import CATEGORY, Tokens, found_as, model_input, sampling_input, seed_input, sprint_input, tokens_input

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
            description="Writes image tokens from a prompt, block by block. With references connected it edits them.",
            inputs=[
                model_input(),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What to draw; with references, what to change.",
                ),
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
                io.Int.Input(
                    "steps",
                    default=IMAGE_STEPS,
                    min=1,
                    max=MAX_STEPS,
                    tooltip="Rounds a block may take.",
                ),
                io.Float.Input(
                    "guidance",
                    default=Guidance.text,
                    min=0.0,
                    max=MAX_GUIDANCE,
                    step=0.1,
                    tooltip="How strongly to follow the prompt. 2 for drawing, 4 for editing; 1 turns it off and "
                    "halves the work.",
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
            ],
            outputs=[
                Tokens.Output(display_name="tokens", tooltip="The drawn image, for Semantic-Token Decode."),
                io.String.Output(display_name="thinking", tooltip="The plan, when thinking is on."),
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
    ) -> bool | str:
        """Refuse an empty prompt and impossible sizes before anything runs; linked values are checked when known."""
        sockets = {"model": model, "references": references, "sampling": sampling, "sprint": sprint}

        def check():
            if prompt is not None:
                check_text("prompt", prompt)
            check_size(PIXELS if height is None else height, PIXELS if width is None else width)

        return complaint(cls, input_types, sockets, check)

    @classmethod
    def execute(
        cls,
        model,
        prompt: str,
        width: int,
        height: int,
        steps: int,
        guidance: float,
        seed: int,
        thinking: bool,
        references=None,
        sampling: SamplingChoice | None = None,
        sprint=None,
    ) -> io.NodeOutput:
        """Draw or edit."""
        check_received(cls, model=model, references=references, sampling=sampling, sprint=sprint)
        choice = sampling or SamplingChoice()
        reporter = host.Reporter(cls.hidden, model)
        drawn = model.generate(
            prompt,
            height,
            width,
            references=references,
            thinking=thinking,
            sampling=replace(choice.sampling, steps=steps),
            guidance=choice.guidance(guidance),
            sprint=sprint,
            seed=seed,
            progress=reporter,
        )
        log.info("LLaDA-Uni sample: %s", drawn.usage)
        reporter.finish(str(drawn.usage))
        return io.NodeOutput(drawn.tokens, drawn.thinking)
