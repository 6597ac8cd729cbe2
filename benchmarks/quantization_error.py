"""How far quantized weights are from what they stand for, by kind of layer and format: no device, no download.

The released checkpoint is not at hand, so the weights are drawn: heavy-tailed numbers (Student's t, five degrees of
freedom unless said otherwise) times a scale a row, a few rows of each kind of layer at released widths. The figure is
the norm of the difference over the norm of the weights; a layer's outputs differ by about as much for inputs that are
not aligned with its weights. Bits are those of all stored tensors over the number of weights.

    python -m benchmarks.quantization_error [--rows 256] [--freedom 5] [--json FILE]
"""

import argparse

import torch

from llada_core.quantization.formats import Format, FP8Block, Int4, Int8, describe

from .support import add_json, show

# Kind of layer -> columns of its weights.
KINDS = {
    "gate, up": 2048,
    "expert down": 512,
    "attention": 2048,
    "dense down": 5120,
    "head": 2048,
    "decoder": 3840,
    "decoder down": 10_240,
    "SigLIP-VQ": 1536,
}
FORMATS: list[Format] = [
    FP8Block(),
    Int8(),
    *(Int4(size, symmetric, search) for size in (64, 128) for symmetric in (False, True) for search in (True, False)),
]


def heavy(rows: int, columns: int, freedom: int, generator: torch.Generator) -> torch.Tensor:
    """float32 [rows, columns]: a normal number over the root of a chi-square over its degrees, times a row's scale."""
    chi = torch.zeros(rows, columns)
    for _ in range(freedom):
        chi += torch.randn(rows, columns, generator=generator).square()
    scale = 0.02 * torch.exp(0.3 * torch.randn(rows, 1, generator=generator))
    return scale * torch.randn(rows, columns, generator=generator) / (chi / freedom).sqrt()


def errors(rows: int, freedom: int) -> dict[str, object]:
    """By format a line of the table: the bits of a weight, and the error in percent of each kind of layer."""
    figures: dict[str, object] = {"": "".join(f"{title:>13}" for title in ("bits", *KINDS))}
    for form in FORMATS:
        line = f"{form.bytes((2048, 2048)) * 8 / 2048**2:13.2f}"
        for seed, columns in enumerate(KINDS.values()):
            weight = heavy(rows, columns, freedom, torch.Generator().manual_seed(seed))
            found = form.dequantize(form.quantize(weight), columns, torch.float32)
            line += f"{float((found - weight).norm() / weight.norm()) * 100:13.2f}"
        figures[describe(form).replace(", part_rows 0", "")] = line
    return figures


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="rows of each kind of layer")
    parser.add_argument("--freedom", type=int, default=5, help="degrees of freedom; fewer make heavier tails")
    add_json(parser)
    arguments = parser.parse_args()
    figures = errors(arguments.rows, arguments.freedom)
    show(f"Relative error in %, Student's t with {arguments.freedom} degrees of freedom", figures, arguments.json)


if __name__ == "__main__":
    main()
