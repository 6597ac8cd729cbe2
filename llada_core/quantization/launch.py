"""Starting the product kernels. Imports Triton; imported only where that is there and is used."""

import torch
import triton

from . import kernels
from .formats import Dense, Format, FP8Block, Int4, Int8, Stored
from .start import start
from .tiles import Tile, choose_tile, fit

# Before 3.4 Triton multiplied no fewer rows than 16.
LEAST_ROWS = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 4) else 16


def can_take(form: Format, x: torch.Tensor) -> bool:
    """Whether the kernel computes with these: numbers of 16 bits, and an even number of columns for 4 bits.

    Compute capabilities before 8.0 have no bfloat16.
    """
    if not isinstance(form, (Dense, FP8Block, Int8, Int4)) or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    if isinstance(form, Int4) and x.shape[-1] % 2:
        return False
    return x.dtype == torch.float16 or capability(x.device)[0] >= 8


def product(
    form: Format,
    stored: Stored,
    x: torch.Tensor,
    shape: tuple[int, ...],
    ends: torch.Tensor | None = None,
    gather: torch.Tensor | None = None,
    share: int = 1,
    scatter: torch.Tensor | None = None,
    gated: bool = False,
    up: Stored | None = None,
    sums: torch.Tensor | None = None,
    out_sums: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Each row times the matrix of its expert, in one launch.

    Args:
        form, stored: the weights, on x's device. With `gated` and without `up`, gate and up are halves of each matrix.
        x: [n, in], contiguous.
        shape: experts, out, in of the weights.
        ends: int32 [experts], where the sorted pairs of each expert end; None where there is one expert.
        gather: int32 [pairs], pair p is computed from row gather[p] // share of x; None takes row p.
        scatter: int32 [pairs], pair p is written to row scatter[p]; None writes to row p.
        gated: silu(gate) * up of two products.
        up: the other weights of the same format and shape.
        sums: `group_sums` of x, where 4 bits have zeros; None computes them.
        out_sums: float32 [pairs, out groups], takes the `group_sums` of what is returned, without `scatter`.
        tile: None chooses.

    Returns:
        [pairs, out] of x's type, half as wide where gate and up are halves.
    """
    experts, features, width = shape
    pairs = len(x) if gather is None else len(gather)
    halves = gated and up is None
    features = features // 2 if halves else features
    tile = tile or choose_tile(form, gated, pairs, experts, width, capability(x.device), LEAST_ROWS)
    tile = fit(tile, form, width)
    first = _pointers(form, stored)
    second = _second_half(form, first, features) if halves else _pointers(form, up) if up else first
    nothing = first["weight"]
    groups = 0
    if isinstance(form, Int4) and not form.symmetric:
        groups = form.groups(width)
        sums = group_sums(x, form.group_size) if sums is None else sums
    out_group = 0 if out_sums is None else features // out_sums.shape[1]
    own_sums = out_group > 0 and tile.features % out_group == 0  # else a program has not all of a group
    out = x.new_empty(pairs, features)
    scale = first["scale"]
    part = min(form.part_rows or features, features) if isinstance(form, FP8Block) else features
    grid = (triton.cdiv(features, tile.features) * experts, tile.split)
    if pairs:
        start(
            kernels.grouped_kernel,
            grid,
            x,
            nothing if gather is None else gather,
            first["weight"],
            second["weight"],
            scale,
            second["scale"],
            first["zeros"],
            second["zeros"],
            sums if groups else nothing,
            nothing if ends is None else ends,
            out,
            nothing if scatter is None else scatter,
            nothing if out_sums is None else out_sums,
            pairs,
            features,
            width,
            first["weight"].stride(-2),
            first["weight"].stride(0),
            scale.stride(0),
            scale.stride(1) if isinstance(form, Int4) else 0,
            part,
            GATHER=0 if gather is None else share,
            SCATTER=scatter is not None,
            EXPERTS=experts,
            GATED=gated,
            FORM=form.name,
            ZERO_GROUPS=max(16, triton.next_power_of_2(groups)) if groups else 0,
            OUT_GROUP=out_group if own_sums else 0,
            ASSEMBLY=x.is_cuda,
            EVEN_N=features % tile.features == 0,
            EVEN_K=width % (tile.columns * tile.steps) == 0,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.features,
            BLOCK_K=tile.columns,
            STEPS=tile.steps,
            SPLIT=tile.split,
            SWAP=tile.swapped,
            STAGES=tile.stages,
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=tile.registers or None,
        )
        if out_sums is not None and not own_sums:
            _sum_groups(out, out_group, out_sums)
    return out


def group_sums(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """x [n, in] -> float32 [n, groups], each row summed over its groups."""
    sums = torch.empty(len(x), triton.cdiv(x.shape[1], group_size), dtype=torch.float32, device=x.device)
    if len(x):
        _sum_groups(x, group_size, sums)
    return sums


def _sum_groups(x: torch.Tensor, group_size: int, sums: torch.Tensor) -> None:
    groups, block = sums.shape[1], 8
    start(
        kernels.sums_kernel,
        (len(x), triton.cdiv(groups, block)),
        x,
        sums,
        x.shape[1],
        groups,
        GROUP=group_size,
        BLOCK=block,
        num_warps=1,
    )


def _pointers(form: Format, stored: Stored) -> dict[str, torch.Tensor]:
    """Weight, scale and zeros, with experts first; what a format has not is its weight, and is not read."""
    weight = stored["weight"]
    if isinstance(form, FP8Block):
        weight = weight.view(torch.uint8)  # devices before 8.9 know no such numbers
    if isinstance(form, Dense):
        parts = {"weight": weight, "scale": weight, "zeros": weight}
    else:
        scale = stored["weight_scale_inv" if isinstance(form, FP8Block) else "weight_scale"]
        parts = {"weight": weight, "scale": scale, "zeros": stored.get("weight_zeros", scale)}
    return {name: tensor if weight.dim() == 3 else tensor[None] for name, tensor in parts.items()}


def _second_half(form: Format, first: dict[str, torch.Tensor], features: int) -> dict[str, torch.Tensor]:
    """The same from the row `features` on: up below gate."""
    places = form.place((1, 2 * features, 1), (slice(None), slice(features, None)))
    names = {"weight_scale": "scale", "weight_scale_inv": "scale", "weight_zeros": "zeros"}
    return first | {names.get(suffix, suffix): first[names.get(suffix, suffix)][at] for suffix, at in places.items()}


def capability(device: torch.device) -> tuple[int, int]:
    """The device's compute capability; (0, 0) where it has none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def try_out(device: torch.device) -> None:
    """A small product of each format there. Raises RuntimeError where one comes out wrong, and what Triton raises."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if capability(device) >= (8, 0) else torch.float16
    weight, x = torch.randn(1, 32, 128, generator=generator), torch.randn(3, 128, generator=generator).to(dtype)
    for form in (Dense(dtype), Int8(), FP8Block(), Int4(64)):
        stored = form.quantize(weight)
        exact = x.double() @ form.dequantize(stored, 128, torch.float64)[0].T
        there = {name: tensor.to(device) for name, tensor in stored.items()}
        found = product(form, there, x.to(device), (1, 32, 128)).cpu().double()
        if not float((found - exact).norm()) < 0.02 * float(exact.norm()):
            raise RuntimeError(f"a product of {form.name} weights came out wrong")
