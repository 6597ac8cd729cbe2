"""Interleaved Generate."""

import logging
from dataclasses import replace

from comfy_api.latest import io

from ..llada_core.checks import check_text
from ..llada_core.options import IMAGE_STEPS, MAX_GUIDANCE, MAX_IMAGES, MAX_STEPS, Guidance
from . import host
from .options import SamplingChoice
from .sockets import ABSENT, check_received, complaint
from .types import CATEGORY, Tokens, folding, found_as, model_input, sampling_input, seed_input, tokens_input

log = logging.getLogger(__name__)


class Interleave(io.ComfyNode):
    """Interleaved Generate."""

    @classmethod
    @folding("steps")
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs; the host reads this."""
        return io.Schema(
            node_id="LLaDAUniInterleave",
            display_name="Interleaved Generate",
            category=CATEGORY,
            **found_as("story", "comic", "text and images"),
            description="Tells a story: text and images in turn, until the model ends it.",
            inputs=[
                model_input(),
                io.String.Input("instruction", multiline=True, dynamic_prompts=True, tooltip="What to tell and show."),
                io.Int.Input(
                    "max_images", default=4, min=1, max=MAX_IMAGES, tooltip="The story ends after so many images."
                ),
                io.Int.Input(
                    "steps",
                    default=IMAGE_STEPS,
                    min=1,
                    max=MAX_STEPS,
                    tooltip="Rounds a block of image tokens may take.",
                ),
                io.Float.Input(
                    "guidance",
                    default=Guidance.text,
                    min=0.0,
                    max=MAX_GUIDANCE,
                    step=0.1,
                    tooltip="How strongly images follow the text; 1 turns it off.",
                ),
                seed_input("Draws at a temperature above 0 (Sampling Options). At temperature 0 it changes nothing."),
                tokens_input("references", "Images that the story starts from (purpose edit).", optional=True),
                sampling_input(),
            ],
            outputs=[
                Tokens.Output(display_name="tokens", tooltip="The images in order, for Semantic-Token Decode."),
                io.String.Output(
                    display_name="text", tooltip="The story, with [image 1], [image 2] ... where they are."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls, input_types=None, model=ABSENT, instruction=None, references=ABSENT, sampling=ABSENT
    ) -> bool | str:
        """Refuse an empty instruction before anything runs."""
        return complaint(
            cls,
            input_types,
            {"model": model, "references": references, "sampling": sampling},
            lambda: instruction is not None and check_text("instruction", instruction),
        )

    @classmethod
    def execute(
        cls,
        model,
        instruction: str,
        max_images: int,
        steps: int,
        guidance: float,
        seed: int,
        references=None,
        sampling: SamplingChoice | None = None,
    ) -> io.NodeOutput:
        """Tell the story."""
        check_received(cls, model=model, references=references, sampling=sampling)
        choice = sampling or SamplingChoice()
        reporter = host.Reporter(cls.hidden, model)
        story = model.interleave(
            instruction,
            max_images,
            references=references,
            sampling=replace(choice.sampling, steps=steps),
            guidance=choice.guidance(guidance),
            seed=seed,
            progress=reporter,
        )
        log.info("LLaDA-Uni story: %s; %s", story.usage, story.ending)
        # A story that the model ended before its first picture is complete, and not what anyone asked for.
        told = story.complete and story.tokens is not None
        text = (story.text if told else f"{story.text}\n\n[The story ends here: {story.ending}.]").strip()
        reporter.finish(text)
        return io.NodeOutput(story.tokens or host.blocked(), text)
