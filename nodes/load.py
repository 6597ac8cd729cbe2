"""Load LLaDA-Uni."""

from comfy_api.latest import io

from ..llada_core.engine import ATTENTION_KINDS, PRECISIONS
from ..llada_core.options import WEIGHTS
from . import host
from .types import CATEGORY, Model, folding, found_as


class Loader(io.ComfyNode):
    """Load LLaDA-Uni."""

    @classmethod
    @folding("attention")
    def define_schema(cls) -> io.Schema:
        """Id, inputs and outputs; the host reads this."""
        return io.Schema(
            node_id="LLaDAUniLoader",
            display_name="Load LLaDA-Uni",
            category=CATEGORY,
            **found_as("LLaDA2.0-Uni", "load checkpoint", "diffusion language model"),
            description="Opens a LLaDA2.0-Uni checkpoint. Every file is checked at once; weights are read when a node "
            "first needs them.",
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=host.checkpoint_names(),
                    tooltip="A folder under models/llada_uni that holds config.json and tokenizer.json. Press R after "
                    "adding one. The miniature comes with the pack and knows coloured shapes only.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    tooltip="Type of the weights in memory. auto: as stored where the device computes in it, else the "
                    "nearest that it does. Quantized layers stay quantized; only the official FP8 is widened to the "
                    "type chosen here.",
                ),
                io.Combo.Input(
                    "attention",
                    options=list(ATTENTION_KINDS),
                    default="auto",
                    tooltip="Attention of the backbone. auto is sdpa, which needs nothing. flash_attention_2 needs the "
                    "flash-attn package. eager is the plain formula, for comparing.",
                ),
                io.Combo.Input(
                    "weights",
                    options=list(WEIGHTS),
                    default="as stored",
                    optional=True,
                    tooltip="How the layers lie in memory. as stored: as in the files, bf16 wants a card of 40 GB or "
                    "more. 8-bit: language model 17 GB, each decoder 6 GB, for 20 to 24 GB. 4-bit: language model "
                    "10 GB and decoders of 8 bits, for 8 to 16 GB. Quantized while they are read, which takes longer; "
                    "a folder that was converted once is read as it is.",
                ),
            ],
            outputs=[Model.Output(display_name="model", tooltip="For every other LLaDA-Uni node.")],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, **_) -> str:
        """Changes when a file of the checkpoint does, so that a repaired checkpoint is opened again."""
        return host.checkpoint_fingerprint(checkpoint)

    @classmethod
    def execute(cls, checkpoint: str, precision: str, attention: str, weights: str = "as stored") -> io.NodeOutput:
        """Open the checkpoint; its parts will live under the host's memory management."""
        return io.NodeOutput(host.open_checkpoint(checkpoint, precision, attention, weights))
