"""Image Q&A."""

import logging
from dataclasses import replace

from comfy_api.latest import io

from ..llada_core.checks import check_count, check_flag, check_seed, check_text
from ..llada_core.image_tokens import ImageTokens, join
from ..llada_core.options import MAX_NEW_TOKENS, MAX_STEPS, TEXT_STEPS
from . import host
from .options import SamplingChoice
from .sockets import ABSENT, check_received, complaint
from .types import CATEGORY, folding, found_as, model_input, sampling_input, seed_input, sprint_input, tokens_input

log = logging.getLogger(__name__)


class ImageQA(io.ComfyNode):
    """Image Q&A."""

    @classmethod
    @folding("steps", "max_new_tokens")
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs; the host reads this."""
        return io.Schema(
            node_id="LLaDAUniImageQA",
            display_name="Image Q&A",
            category=CATEGORY,
            **found_as("caption", "describe image", "ask", "VQA", "image to text"),
            description="Answers a question about one image, several, or none.",
            inputs=[
                model_input(),
                io.String.Input("question", multiline=True, dynamic_prompts=True, tooltip="What to ask."),
                io.Int.Input(
                    "steps",
                    default=TEXT_STEPS,
                    min=1,
                    max=MAX_STEPS,
                    tooltip="Rounds that each block of text may take.",
                ),
                io.Int.Input(
                    "max_new_tokens", default=2048, min=1, max=MAX_NEW_TOKENS, tooltip="The longest answer, in tokens."
                ),
                seed_input("Draws at a temperature above 0 (Sampling Options). At temperature 0 it changes nothing."),
                io.Image.Input("image", optional=True, tooltip="One image or a batch to ask about."),
                tokens_input(
                    "tokens",
                    "Images already encoded (purpose understand); they come after those of the image input.",
                    optional=True,
                ),
                sampling_input(),
                sprint_input(),
                io.Boolean.Input(
                    "one_by_one",
                    default=False,
                    optional=True,
                    tooltip="Off: one answer about all images together. On: an answer for each image.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="answer",
                    is_output_list=True,
                    tooltip="The answer; with one_by_one, one for each image.",
                )
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls,
        input_types=None,
        model=ABSENT,
        question=None,
        image=ABSENT,
        tokens=ABSENT,
        sampling=ABSENT,
        sprint=ABSENT,
    ) -> bool | str:
        """Refuse an empty question before anything runs."""
        sockets = {"model": model, "image": image, "tokens": tokens, "sampling": sampling, "sprint": sprint}
        return complaint(cls, input_types, sockets, lambda: question is not None and check_text("question", question))

    @classmethod
    def execute(
        cls,
        model,
        question: str,
        steps: int,
        max_new_tokens: int,
        seed: int,
        image=None,
        tokens: ImageTokens | None = None,
        sampling: SamplingChoice | None = None,
        sprint=None,
        one_by_one: bool = False,
    ) -> io.NodeOutput:
        """Encode what is not encoded yet, then answer."""
        check_received(cls, model=model, image=image, tokens=tokens, sampling=sampling, sprint=sprint)
        check_text("question", question)
        check_count("max_new_tokens", max_new_tokens, 1, MAX_NEW_TOKENS)
        check_flag("one_by_one", one_by_one)
        check_seed(seed)
        choice = replace((sampling or SamplingChoice()).sampling, steps=steps)
        progress = host.Reporter(cls.hidden, model)
        parts = [] if tokens is None else [tokens.for_codebook(model.codebook_size)]
        if image is not None:
            batches = list(image.split(1)) if one_by_one else [image]
            parts = model.encode(batches, "understand", progress=progress) + parts
        images = join(parts) if parts else None
        asked = [ImageTokens((g,), images.codebook_size) for g in images.grids] if one_by_one and images else [images]
        found = model.answer(
            question,
            asked,
            max_new_tokens=max_new_tokens,
            sampling=choice,
            sprint=sprint,
            seed=seed,
            progress=progress,
        )
        log.info("LLaDA-Uni answer: %s", sum((answer.usage for answer in found[1:]), found[0].usage))
        answers = [answer.text for answer in found]
        said = "\n\n".join(answers)
        progress.finish(said if images is not None else f"[No picture is connected: answered without one.]\n\n{said}")
        return io.NodeOutput(answers, ui={"text": answers})
