"""Sampling Options and SPRINT Options."""

from dataclasses import dataclass, field

from comfy_api.latest import io

from ..llada_core.checks import check_range
from ..llada_core.options import (
    CONFIDENCE_KINDS,
    MAX_BLOCK,
    MAX_GUIDANCE,
    MAX_NEW_TOKENS,
    MAX_STEPS,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    Guidance,
    Sampling,
    Sprint,
)
from .types import CATEGORY, SamplingOptions, SprintOptions, folding, found_as


@dataclass(frozen=True)
class SamplingChoice:
    """What Sampling Options carries: the block loop's options, and what Sample has no widget for of guidance."""

    sampling: Sampling = field(default_factory=Sampling)
    image_guidance: float = Guidance.image
    guidance_rescale: float = Guidance.rescale

    def guidance(self, text: float) -> Guidance:
        """The guidance of a text scale and this choice."""
        return Guidance(text, self.image_guidance, self.guidance_rescale)


class SamplingNode(io.ComfyNode):
    """Sampling Options."""

    @classmethod
    @folding("block_length", "top_k", "top_p", "guidance_rescale", "thinking_steps")
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs; the host reads this."""
        return io.Schema(
            node_id="LLaDAUniSampling",
            display_name="Sampling Options",
            category=CATEGORY,
            **found_as("temperature", "threshold", "image guidance"),
            description="How the diffusion language model fills its blocks. The defaults are the model's own.",
            inputs=[
                io.Int.Input(
                    "block_length",
                    default=Sampling.block_length,
                    min=1,
                    max=MAX_BLOCK,
                    tooltip="Tokens filled together. Trained with 32; other lengths lose quality.",
                ),
                io.Float.Input(
                    "threshold",
                    default=Sampling.threshold,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="A token is kept as soon as the model is surer than this. Lower is faster and rougher.",
                ),
                io.Float.Input(
                    "temperature",
                    default=Sampling.temperature,
                    min=0.0,
                    max=MAX_TEMPERATURE,
                    step=0.05,
                    tooltip="0 takes the most probable token, so the seed has no effect; 1 draws by probability.",
                ),
                io.Int.Input(
                    "top_k",
                    default=Sampling.top_k,
                    min=0,
                    max=MAX_TOP_K,
                    tooltip="Draw among so many of the best tokens; 0 is all. Needs a temperature above 0.",
                ),
                io.Float.Input(
                    "top_p",
                    default=Sampling.top_p,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Draw among the best tokens that make up this share. Needs a temperature above 0.",
                ),
                io.Float.Input(
                    "guidance_rescale",
                    default=Guidance.rescale,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Draws guided predictions back to the spread of the plain ones; 0 turns it off.",
                ),
                io.Float.Input(
                    "image_guidance",
                    default=Guidance.image,
                    min=0.0,
                    max=MAX_GUIDANCE,
                    step=0.1,
                    tooltip="When editing: how strongly to hold on to the references. In a story: above 0, each "
                    "picture is an edit of the one before. Above 0 each round costs half as much again.",
                ),
                io.Int.Input(
                    "thinking_steps",
                    default=Sampling.thinking_steps,
                    min=1,
                    max=MAX_STEPS,
                    tooltip="Rounds a block may take while the model thinks, and in the texts of a story.",
                ),
                io.Int.Input(
                    "thinking_length",
                    default=Sampling.thinking_length,
                    min=1,
                    max=MAX_NEW_TOKENS,
                    tooltip="The most tokens that thinking may write, and each text of a story.",
                ),
            ],
            outputs=[
                SamplingOptions.Output(
                    display_name="sampling", tooltip="For Sample, Image Q&A and Interleaved Generate."
                )
            ],
        )

    @classmethod
    def execute(cls, guidance_rescale: float, image_guidance: float, **sampling) -> io.NodeOutput:
        """Build the options; they check themselves."""
        choice = SamplingChoice(Sampling(**sampling), image_guidance, guidance_rescale)
        choice.guidance(1.0)
        return io.NodeOutput(choice)


class SprintNode(io.ComfyNode):
    """SPRINT Options."""

    @classmethod
    @folding("keep_ratio", "warmup", "alpha", "confidence")
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs; the host reads this."""

        def ratio(name: str, default: float | None, tooltip: str) -> io.Input:
            return io.Float.Input(
                name, default=default, min=-1.0 if name != "keep_ratio" else 0.0, max=1.0, step=0.05, tooltip=tooltip
            )

        return io.Schema(
            node_id="LLaDAUniSprint",
            display_name="SPRINT Options",
            category=CATEGORY,
            **found_as("faster sampling", "speed up"),
            description="SPRINT: keeps the useful part of what came before and unmasks as fast as the model is sure. "
            "Fewer rounds for a small loss; small text in pictures loses most.",
            inputs=[
                ratio(
                    "keep_ratio",
                    Sprint.keep_ratio,
                    "Share of the earlier positions kept where no ratio of its own is given.",
                ),
                ratio("text_keep_ratio", Sprint.text_keep_ratio, "Share of earlier text kept. -1 uses keep_ratio."),
                ratio(
                    "image_keep_ratio",
                    Sprint.image_keep_ratio,
                    "Share of earlier image tokens kept. -1 uses keep_ratio.",
                ),
                io.Float.Input(
                    "threshold",
                    default=Sprint.threshold,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="A token is kept as soon as the confidence is above this. The paper uses 0.93 and 0.95.",
                ),
                io.Int.Input(
                    "warmup",
                    default=Sprint.warmup,
                    min=0,
                    max=MAX_STEPS,
                    tooltip="Rounds of each block that still see everything.",
                ),
                io.Float.Input(
                    "alpha",
                    default=Sprint.alpha,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="What makes a position worth keeping: 1 its key's norm, 0 the model's certainty, 0.5 both.",
                ),
                io.Combo.Input(
                    "confidence",
                    options=list(CONFIDENCE_KINDS),
                    default=Sprint.confidence,
                    tooltip="low_confidence: probability of the best token. top_k_margin: its lead over the second. "
                    "neg_entropy: certainty over all tokens (never above 0, so the threshold never accepts).",
                ),
            ],
            outputs=[SprintOptions.Output(display_name="sprint", tooltip="For Sample and Image Q&A.")],
        )

    @classmethod
    def execute(cls, text_keep_ratio: float, image_keep_ratio: float, **rest) -> io.NodeOutput:
        """Build the options; they check themselves."""
        for name, ratio in (("text_keep_ratio", text_keep_ratio), ("image_keep_ratio", image_keep_ratio)):
            check_range(name, ratio, -1.0, 1.0, "Use -1 for keep_ratio.")
        text, image = (None if ratio < 0 else ratio for ratio in (text_keep_ratio, image_keep_ratio))
        return io.NodeOutput(Sprint(text_keep_ratio=text, image_keep_ratio=image, **rest))
