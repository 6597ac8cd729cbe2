"""Pad, Crop and Paste Image Tokens, and Preview Tokens: tokens as a canvas."""

import torch
from comfy_api.latest import io

from ..llada_core.checks import MAX_SIDE, PIXELS
from ..llada_core.token_edits import crop, pad, paste
from .sockets import ABSENT, check_received, complaint
from .types import CATEGORY, Tokens, found_as, model_input, tokens_input


def _pixels(name: str, tooltip: str, least: int = 0, default: int = 0) -> io.Input:
    return io.Int.Input(name, default=default, min=least, max=MAX_SIDE, step=PIXELS, tooltip=tooltip)


class PadTokens(io.ComfyNode):
    """Pad Image Tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs; the host reads this."""
        return io.Schema(
            node_id="LLaDAUniPadTokens",
            display_name="Pad Image Tokens",
            category=CATEGORY,
            **found_as("outpaint", "extend image", "pad"),
            description="A larger canvas around an image: what is known stays where it stood, and a mask marks the "
            "rest for Diffusion-LLM Sample to draw.",
            inputs=[
                tokens_input("tokens", "One image."),
                _pixels("left", "Pixels to add at the left of the decoded picture."),
                _pixels("top", "Pixels to add above."),
                _pixels("right", "Pixels to add at the right.", default=256),
                _pixels("bottom", "Pixels to add below."),
            ],
            outputs=[
                Tokens.Output(display_name="tokens", tooltip="The larger image, for the tokens input of Sample."),
                io.Mask.Output(display_name="mask", tooltip="What is new of it, for the mask input of Sample."),
            ],
        )

    @classmethod
    def validate_inputs(cls, input_types=None, tokens=ABSENT) -> bool | str:
        """Refuse a value where a link belongs."""
        return complaint(cls, input_types, {"tokens": tokens})

    @classmethod
    def execute(cls, tokens, left: int, top: int, right: int, bottom: int) -> io.NodeOutput:
        """Pad."""
        check_received(cls, tokens=tokens)
        return io.NodeOutput(*pad(tokens, left, top, right, bottom))


class CropTokens(io.ComfyNode):
    """Crop Image Tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs; the host reads this."""
        return io.Schema(
            node_id="LLaDAUniCropTokens",
            display_name="Crop Image Tokens",
            category=CATEGORY,
            **found_as("cut", "crop"),
            description="Cuts a rectangle out of every image, token by token.",
            inputs=[
                tokens_input("tokens", "One image or several."),
                _pixels("left", "Where the rectangle begins, in pixels of the decoded picture."),
                _pixels("top", "The same, from above."),
                _pixels("width", "Width of the rectangle in pixels.", PIXELS, 512),
                _pixels("height", "Height of the rectangle in pixels.", PIXELS, 512),
            ],
            outputs=[Tokens.Output(display_name="tokens", tooltip="The rectangles.")],
        )

    @classmethod
    def validate_inputs(cls, input_types=None, tokens=ABSENT) -> bool | str:
        """Refuse a value where a link belongs."""
        return complaint(cls, input_types, {"tokens": tokens})

    @classmethod
    def execute(cls, tokens, left: int, top: int, width: int, height: int) -> io.NodeOutput:
        """Crop."""
        check_received(cls, tokens=tokens)
        return io.NodeOutput(crop(tokens, left, top, width, height))


class PasteTokens(io.ComfyNode):
    """Paste Image Tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs; the host reads this."""
        return io.Schema(
            node_id="LLaDAUniPasteTokens",
            display_name="Paste Image Tokens",
            category=CATEGORY,
            **found_as("composite", "paste", "collage"),
            description="Lays an image over another, token by token. The mask marks the seam, should it be drawn anew.",
            inputs=[
                tokens_input("tokens", "The image below."),
                tokens_input("piece", "What is laid over it."),
                _pixels("left", "Where the piece begins, in pixels of the decoded picture."),
                _pixels("top", "The same, from above."),
            ],
            outputs=[
                Tokens.Output(display_name="tokens", tooltip="The two as one."),
                io.Mask.Output(display_name="seam", tooltip="The outermost tokens of the piece, and those around it."),
            ],
        )

    @classmethod
    def validate_inputs(cls, input_types=None, tokens=ABSENT, piece=ABSENT) -> bool | str:
        """Refuse a value where a link belongs."""
        return complaint(cls, input_types, {"tokens": tokens, "piece": piece})

    @classmethod
    def execute(cls, tokens, piece, left: int, top: int) -> io.NodeOutput:
        """Paste."""
        check_received(cls, tokens=tokens, piece=piece)
        return io.NodeOutput(*paste(tokens, piece, left, top))


class PreviewTokens(io.ComfyNode):
    """Preview Tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs; the host reads this."""
        return io.Schema(
            node_id="LLaDAUniPreviewTokens",
            display_name="Preview Tokens",
            category=CATEGORY,
            **found_as("token grid", "preview"),
            description="The token grid as a picture: a coloured square for each token, without any decoder.",
            inputs=[
                model_input(),
                tokens_input("tokens", "One image or several."),
                io.Int.Input("cell", default=16, min=1, max=64, tooltip="Pixels of a square's side."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    is_output_list=True,
                    tooltip="One batch where all sizes agree, else the images one after the other.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, input_types=None, model=ABSENT, tokens=ABSENT) -> bool | str:
        """Refuse a value where a link belongs."""
        return complaint(cls, input_types, {"model": model, "tokens": tokens})

    @classmethod
    def execute(cls, model, tokens, cell: int) -> io.NodeOutput:
        """Colour every grid."""
        check_received(cls, model=model, tokens=tokens)
        images = model.preview(tokens, cell)
        if len({image.shape for image in images}) == 1:
            return io.NodeOutput([torch.stack(images)])
        return io.NodeOutput([image[None] for image in images])
