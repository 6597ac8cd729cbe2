"""Vary Image Tokens."""

import logging
from dataclasses import replace

from comfy_api.latest import io

from ..llada_core.checks import check_choice, check_text
from ..llada_core.image_tokens import join
from ..llada_core.options import MAX_BATCH, Sampling
from . import host
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

CHOICES = ("by seed", "least certain")


class Vary(io.ComfyNode):
    """Vary Image Tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs; the host reads this."""
        return io.Schema(
            node_id="LLaDAUniVary",
            display_name="Vary Image Tokens",
            category=CATEGORY,
            **found_as("variations", "variation", "remix", "resample"),
            description="Variations of an image: a share of its tokens is masked again and drawn, the others stay.",
            inputs=[
                model_input(),
                tokens_input("tokens", "One image."),
                prompt_input("What the image shows; with references, the instruction that it came from."),
                io.Float.Input(
                    "strength",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the tokens that are drawn anew. 0 changes one, 1 all.",
                ),
                io.Int.Input(
                    "count", default=4, min=1, max=MAX_BATCH, tooltip="Variations, drawn at once; i uses seed + i."
                ),
                io.Combo.Input(
                    "choose",
                    options=list(CHOICES),
                    default=CHOICES[0],
                    tooltip="by seed: tokens anywhere, other ones for each variation. least certain: those that the "
                    "model is least sure of, which takes two rounds a block to find out.",
                ),
                steps_input(),
                guidance_input("How strongly to follow the prompt. 2 for drawing, 4 with references."),
                seed_input("Which tokens, and the draws."),
                tokens_input("references", "What the image was edited from, if it was.", optional=True),
                sampling_input(),
                sprint_input(),
            ],
            outputs=[Tokens.Output(display_name="tokens", tooltip="The variations, in order.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls,
        input_types=None,
        model=ABSENT,
        tokens=ABSENT,
        prompt=None,
        references=ABSENT,
        sampling=ABSENT,
        sprint=ABSENT,
    ) -> bool | str:
        """Refuse an empty prompt before anything runs."""
        sockets = {"model": model, "tokens": tokens, "references": references, "sampling": sampling, "sprint": sprint}
        return complaint(cls, input_types, sockets, lambda: prompt is not None and check_text("prompt", prompt))

    @classmethod
    def execute(
        cls,
        model,
        tokens,
        prompt: str,
        strength: float,
        count: int,
        choose: str,
        steps: int,
        guidance: float,
        seed: int,
        references=None,
        sampling: SamplingChoice | None = None,
        sprint=None,
    ) -> io.NodeOutput:
        """Vary."""
        check_received(cls, model=model, tokens=tokens, references=references, sampling=sampling, sprint=sprint)
        check_choice("choose", choose, CHOICES)  # ComfyUI 0.3.64 lets any text through
        choice = sampling or SamplingChoice(Sampling(temperature=1.0))
        reporter = host.Reporter(cls.hidden, model)
        found = model.vary(
            tokens,
            prompt,
            strength,
            count,
            least_certain=choose == CHOICES[1],
            references=references,
            sampling=replace(choice.sampling, steps=steps),
            guidance=choice.guidance(guidance),
            sprint=sprint,
            seed=seed,
            progress=reporter,
        )
        usage = sum((one.usage for one in found[1:]), found[0].usage)
        log.info("LLaDA-Uni variations: %s", usage)
        reporter.finish(str(usage))
        return io.NodeOutput(join([one.tokens for one in found]))
