"""SigLIP-VQ Encode."""

from comfy_api.latest import io

from . import host
from .sockets import ABSENT, check_received, complaint
from .types import CATEGORY, Tokens, folding, found_as, model_input


class Encode(io.ComfyNode):
    """SigLIP-VQ Encode."""

    @classmethod
    @folding("fit", "pixels")
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs; the host reads this."""
        return io.Schema(
            node_id="LLaDAUniEncode",
            display_name="SigLIP-VQ Encode",
            category=CATEGORY,
            **found_as("image to tokens", "reference image", "VQ encode"),
            description="Turns images into semantic tokens, one for each 16x16 pixels of the resized image.",
            inputs=[
                model_input(),
                io.Image.Input(
                    "image", tooltip="One image or a batch; a batch gives as many token grids. Alpha goes over white."
                ),
                io.Combo.Input(
                    "purpose",
                    options=["edit", "understand"],
                    default="edit",
                    tooltip="edit: sized as a reference. understand: sized for questions, with more detail; "
                    "each image of a batch then gets a smaller size.",
                ),
                io.Combo.Input(
                    "fit",
                    options=["cover", "crop"],
                    default="cover",
                    tooltip="For edit. cover: resize, then trim. crop: cut the middle out at full size, as the "
                    "original code does.",
                ),
                io.Int.Input(
                    "pixels",
                    default=0,
                    min=0,
                    max=4096 * 4096,
                    optional=True,
                    tooltip="Area of the resized image in pixels; 0 is the checkpoint's own. Larger keeps more detail "
                    "and costs more tokens.",
                ),
            ],
            outputs=[Tokens.Output(display_name="tokens", tooltip="One grid for each image.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, input_types=None, model=ABSENT, image=ABSENT) -> bool | str:
        """Refuse values in place of links before anything runs."""
        return complaint(cls, input_types, {"model": model, "image": image})

    @classmethod
    def execute(cls, model, image, purpose: str, fit: str, pixels: int = 0) -> io.NodeOutput:
        """Encode all images of the batch."""
        check_received(cls, model=model, image=image)
        return io.NodeOutput(model.encode(image, purpose, fit, pixels, progress=host.Reporter(cls.hidden, model)))
