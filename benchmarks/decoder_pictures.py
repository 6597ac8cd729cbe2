"""What 8 bits cost the decoders' pictures: the miniature's, judged by a checker that looks at pixels.

Pictures of held-out scenes become codes, and every form of a decoder makes pictures of those codes again, with the same
noise. Right is a picture in which all objects are there with shape, colour, size and place. Distances are of the
latents from float32's, relative, the mean over pictures. It computes on the CPU, also what a GPU would in 8 bits.

    python -m benchmarks.decoder_pictures CHECKPOINT [--count 40] [--normal 10] [--json FILE]
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from dev.miniature.checker import look
from dev.miniature.world import Scene, render
from llada_core.decoder.decode import decode_latents, sample_latents
from llada_core.decoder.products import Products, RowProduct, int_mm
from llada_core.decoder.transformer import SemanticDecoder
from llada_core.engine import LLaDAUni
from llada_core.options import Decoding
from llada_core.placement import OneDevice
from llada_core.quantization.formats import Format, FP8Block, Int8

from .decoder import distance, quantize
from .quality import examples
from .support import add_json, show

CPU = torch.device("cpu")


def fp8_product(
    values: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """What the GPU's product of fp8 computes, but for the order of its sums."""
    stored = {"weight": weight, "weight_scale_inv": weight_scale}
    dense = FP8Block().dequantize(stored, weight.shape[1], torch.float32)
    return (values.float() * scale @ dense.t()).to(dtype)


# name -> type of what is dense, form of the blocks' weights, how 8-bit activations are multiplied.
FORMS: dict[str, tuple[torch.dtype, Format | None, RowProduct | None]] = {
    "float32": (torch.float32, None, None),
    "bfloat16": (torch.bfloat16, None, None),
    "int8 weights": (torch.bfloat16, Int8(), None),
    "int8 weights and activations": (torch.bfloat16, Int8(), int_mm),
    "fp8 blocks": (torch.bfloat16, FP8Block(), None),
    "fp8 blocks and activations": (torch.bfloat16, FP8Block(), fp8_product),
}


def latents_of(model: LLaDAUni, part: str, form: str, grids: list[torch.Tensor]) -> list[torch.Tensor]:
    """The latents that a form of a decoder makes of each grid."""
    dtype, weights, function = FORMS[form]
    decoder: SemanticDecoder = model.components[part].load(dtype)
    if weights is not None:
        quantize(decoder, weights)
        decoder.products = Products({} if function is None else {type(weights): function})
    embedder, decoding = model.components["sigvq"].load(torch.float32), Decoding(turbo=part == "decoder-turbo")
    return [
        sample_latents(decoder, embedder(grid), tuple(grid.shape), decoding, seed, CPU, dtype)
        for seed, grid in enumerate(grids)
    ]


def measure(model: LLaDAUni, part: str, count: int, figures: dict[str, object]) -> None:
    """Note per cent of right pictures and distances for every form of a decoder."""
    scenes = [made.frames[-1][1] for made in examples("draw", count, 0)]
    grids = [grid_of(model, scene) for scene in scenes]
    vae = model.components["vae"].load(torch.float32)
    exact = latents_of(model, part, "float32", grids)
    for form in FORMS:
        latents = exact if form == "float32" else latents_of(model, part, form, grids)
        pictures = [decode_latents(vae, one, CPU, torch.float32)[0] for one in latents]
        right = [look(picture.numpy()).shows(scene) for picture, scene in zip(pictures, scenes, strict=True)]
        figures[f"{part}, {form}: right, %"] = 100 * sum(right) / len(right)
        if form != "float32":
            apart = [distance(one, other) for one, other in zip(latents, exact, strict=True)]
            figures[f"{part}, {form}: distance"] = f"{sum(apart) / len(apart):.4f}"


def grid_of(model: LLaDAUni, scene: Scene) -> torch.Tensor:
    """Codes of a scene's picture."""
    picture = torch.from_numpy(np.asarray(render(scene)).copy())[None] / 255
    return model.encode(picture, "edit").grids[0]


@torch.no_grad()
def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=40, help="pictures of the turbo decoder")
    parser.add_argument("--normal", type=int, default=10, help="pictures of the normal decoder")
    add_json(parser)
    options = parser.parse_args()
    model = LLaDAUni(options.checkpoint, OneDevice())
    figures: dict[str, object] = {}
    measure(model, "decoder-turbo", options.count, figures)
    if options.normal:
        measure(model, "decoder", options.normal, figures)
    show(f"Decoders in 8 bits, {options.count} and {options.normal} pictures", figures, options.json)


if __name__ == "__main__":
    main()
