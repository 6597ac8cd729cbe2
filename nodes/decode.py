"""Semantic-Token Decode."""

import time

import torch
from comfy_api.latest import io

from ..llada_core.options import MAX_DECODER_STEPS, Decoding
from . import host
from .sockets import ABSENT, check_received, complaint
from .types import CATEGORY, folding, found_as, model_input, seed_input, tokens_input


class Decode(io.ComfyNode):
    """Semantic-Token Decode."""

    @classmethod
    @folding("steps")
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs; the host reads this."""
        return io.Schema(
            node_id="LLaDAUniDecode",
            display_name="Semantic-Token Decode",
            category=CATEGORY,
            **found_as("tokens to image", "VQ decode", "turbo"),
            description="Turns image tokens into pixels, 32x32 for each token.",
            inputs=[
                model_input(),
                tokens_input("tokens", "From Diffusion-LLM Sample or SigLIP-VQ Encode."),
                io.Boolean.Input(
                    "turbo",
                    default=True,
                    tooltip="The distilled decoder: 8 rounds instead of 49 double ones, a little less fine.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=MAX_DECODER_STEPS,
                    tooltip="Steps of the decoder; 0 is its own default: 8 with turbo, 50 without.",
                ),
                seed_input("The noise that the picture grows from. Image i of a batch uses seed + i."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    is_output_list=True,
                    tooltip="One batch where all sizes agree, else the images one after the other.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, input_types=None, model=ABSENT, tokens=ABSENT, turbo=None, steps=None) -> bool | str:
        """Refuse impossible steps before anything runs; whether a linked `turbo` takes 1 step is known later."""

        def check():
            if steps is not None:
                Decoding(turbo=True if turbo is None else turbo, steps=steps)

        return complaint(cls, input_types, {"model": model, "tokens": tokens}, check)

    @classmethod
    def execute(cls, model, tokens, turbo: bool, steps: int, seed: int) -> io.NodeOutput:
        """Decode every grid."""
        check_received(cls, model=model, tokens=tokens)
        decoding = Decoding(turbo=turbo, steps=steps, seed=seed)
        began = time.perf_counter()
        reporter = host.Reporter(cls.hidden, model, latents=True)
        images = model.decode(tokens, decoding, progress=reporter)
        sizes = ", ".join(dict.fromkeys(f"{image.shape[1]}x{image.shape[0]}" for image in images))
        many = f"{len(images)} pictures" if len(images) > 1 else "1 picture"
        took = time.perf_counter() - began
        reporter.finish(f"{many}, {sizes}, {decoding.rounds} steps, {took:.1f} s", images[-1])
        if len({image.shape for image in images}) == 1:
            return io.NodeOutput([torch.stack(images)])
        return io.NodeOutput([image[None] for image in images])
