"""FP8 block quantization of the FP8 release (docs/model.md, Files): weight = fp8 x scale of its 128 x 128 block."""

import torch

BLOCK = 128
SCALE_SUFFIX = ".weight_scale_inv"


def scale_shape(weight_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a weight [..., rows, columns]: one per block, ceil-divided."""
    *lead, rows, columns = weight_shape
    return (*lead, -(-rows // BLOCK), -(-columns // BLOCK))


def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn [..., rows, columns] and float32 scales of `scale_shape` -> float32 of the weight's shape."""
    rows, columns = weight.shape[-2:]
    spread = scale.repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :columns]
    return weight.to(torch.float32) * spread
