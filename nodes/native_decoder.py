"""The decoder as one of ComfyUI's own models: Load Decoder, Tokens to Conditioning, Decoder Guidance and Schedule.

Hosts that know Z-Image offer them. What needs such a host is imported where a node runs, so that any host can read this
file.
"""

from comfy_api.latest import io

from ..llada_core.checks import PIXELS, check_choice, check_count, check_range
from ..llada_core.options import MAX_DECODER_STEPS
from ..llada_core.zimage import DECODERS, decoder_files, features_of, vae_files
from .sockets import ABSENT, check_received, complaint
from .types import CATEGORY, found_as, model_input, tokens_input


class DecoderModel(io.ComfyNode):
    """Load Decoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs; the host reads this."""
        return io.Schema(
            node_id="LLaDAUniDecoderModel",
            display_name="Load Decoder",
            category=CATEGORY,
            **found_as("load diffusion model", "Z-Image", "KSampler"),
            description="Opens a decoder as one of ComfyUI's own models, for KSampler, LoRA, masks and whatever else "
            "takes a MODEL, and the VAE that goes with it.",
            inputs=[
                model_input(),
                io.Combo.Input(
                    "decoder",
                    options=list(DECODERS),
                    default=DECODERS[0],
                    tooltip="turbo: 8 steps, cfg 1, sampler lcm. normal: 49 steps, cfg 2, sampler euler, behind "
                    "Decoder Guidance. Scheduler simple for both.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="decoder", tooltip="ComfyUI's Z-Image with the weights of this decoder."),
                io.Vae.Output(display_name="vae", tooltip="The checkpoint's, for VAE Decode and VAE Encode."),
            ],
        )

    @classmethod
    def validate_inputs(cls, input_types=None, model=ABSENT, decoder=None) -> bool | str:
        """Refuse another decoder before anything runs; ComfyUI 0.3.64 lets any text through."""
        return complaint(
            cls,
            input_types,
            {"model": model},
            lambda: decoder is not None and check_choice("decoder", decoder, DECODERS),
        )

    @classmethod
    def execute(cls, model, decoder: str) -> io.NodeOutput:
        """Read what of the two is not in memory yet."""
        check_received(cls, model=model)
        from .host.zimage import decoder as zimage

        return io.NodeOutput(*zimage.decoder_and_vae(model.manager, decoder_files(model, decoder), vae_files(model)))


class TokensToConditioning(io.ComfyNode):
    """Tokens to Conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs; the host reads this."""
        return io.Schema(
            node_id="LLaDAUniConditioning",
            display_name="Tokens to Conditioning",
            category=CATEGORY,
            **found_as("tokens to image", "KSampler"),
            description="Turns image tokens into what KSampler needs to draw them with a decoder from Load Decoder.",
            inputs=[
                model_input(),
                tokens_input("tokens", "From Diffusion-LLM Sample or SigLIP-VQ Encode; several must be of one size."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The features of the tokens."),
                io.Conditioning.Output(display_name="negative", tooltip="Zeros, for the normal decoder's guidance."),
                io.Latent.Output(display_name="latent", tooltip="Empty, as large as the picture; one for each grid."),
                io.Int.Output(display_name="width", tooltip="Of the picture, in pixels; a photo has to fit."),
                io.Int.Output(display_name="height", tooltip="Of the picture, in pixels."),
            ],
        )

    @classmethod
    def validate_inputs(cls, input_types=None, model=ABSENT, tokens=ABSENT) -> bool | str:
        """Refuse values in place of links before anything runs."""
        return complaint(cls, input_types, {"model": model, "tokens": tokens})

    @classmethod
    def execute(cls, model, tokens) -> io.NodeOutput:
        """Embed the codes."""
        check_received(cls, model=model, tokens=tokens)
        from .host.zimage import decoder as zimage

        features, shape = features_of(model, tokens)
        # ComfyUI 0.4.0 reads pooled_output without asking whether it is there.
        sides = (features, features.new_zeros(features.shape))
        positive, negative = ([[side, {"pooled_output": None}]] for side in sides)
        h, w = tokens.sizes[0]
        return io.NodeOutput(positive, negative, zimage.empty_latent(shape), w * PIXELS, h * PIXELS)


class DecoderGuidance(io.ComfyNode):
    """Decoder Guidance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs; the host reads this."""
        return io.Schema(
            node_id="LLaDAUniDecoderGuidance",
            display_name="Decoder Guidance",
            category=CATEGORY,
            **found_as("cfg", "CFG norm"),
            description="Guides the normal decoder as its authors do: by KSampler's cfg, but never to a longer step "
            "than without guidance.",
            inputs=[
                io.Model.Input("model", tooltip="The normal decoder from Load Decoder. cfg 2 is the authors' setting.")
            ],
            outputs=[io.Model.Output(display_name="guided", tooltip="For KSampler, with cfg 2.")],
        )

    @classmethod
    def validate_inputs(cls, input_types=None, model=ABSENT) -> bool | str:
        """Refuse values in place of links before anything runs."""
        return complaint(cls, input_types, {"model": model})

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        """Set the host's cfg function on a copy."""
        check_received(cls, model=model)
        from .host.zimage import sampling

        return io.NodeOutput(sampling.with_decoder_guidance(model))


class DecoderSchedule(io.ComfyNode):
    """Decoder Schedule."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs; the host reads this."""
        return io.Schema(
            node_id="LLaDAUniDecoderSchedule",
            display_name="Decoder Schedule",
            category=CATEGORY,
            **found_as("scheduler", "sigmas"),
            description="The noise levels of a decoder for any number of steps, exactly; ComfyUI's own schedulers take "
            "the nearest of a table.",
            inputs=[
                io.Model.Input("model", tooltip="A decoder from Load Decoder."),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=MAX_DECODER_STEPS,
                    tooltip="Evaluations, as KSampler counts them. 0 is the decoder's own: 8 for turbo, 49 for normal "
                    "(Decode says 50, as it counts both ends).",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="As in KSampler: below 1 the latents that come in are kept in part.",
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="For SamplerCustom.")],
        )

    @classmethod
    def validate_inputs(cls, input_types=None, model=ABSENT) -> bool | str:
        """Refuse values in place of links before anything runs."""
        return complaint(cls, input_types, {"model": model})

    @classmethod
    def execute(cls, model, steps: int, denoise: float) -> io.NodeOutput:
        """Compute them."""
        check_received(cls, model=model)
        check_count("steps", steps, 0, MAX_DECODER_STEPS, "Use 0 for the decoder's own.")
        check_range("denoise", denoise, 0.0, 1.0)
        from .host.zimage import decoder as zimage
        from .host.zimage import sampling

        return io.NodeOutput(sampling.even_sigmas(model, steps or zimage.own_steps(model), denoise))


NODES = (DecoderModel, TokensToConditioning, DecoderGuidance, DecoderSchedule)
