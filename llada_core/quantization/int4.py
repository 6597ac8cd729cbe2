"""Four bits a weight: scales and zeros of groups by their error, and two numbers in a byte.

A group of columns of a row becomes w = code x scale + zero with codes from -8 to 7. Scales and zeros are rounded to
bfloat16 before the codes are chosen, so their rounding costs next to nothing. No calibration data is used.
"""

import torch
import torch.nn.functional as F

# How much of a group's range the codes cover. Clipping the few largest numbers makes all other steps finer; for
# weights with heavy tails the best choice lies between 0.5 and 1.
CLIPPINGS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
REFINEMENTS = 2  # rounds of: the best scale and zero for the codes, then the codes anew
# The largest scale whose multiples by -8 to 7 are finite in bfloat16.
LARGEST = torch.finfo(torch.bfloat16).max / 8


def choose(
    rows: torch.Tensor, group_size: int, symmetric: bool, search: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales and zeros of the groups of some rows.

    Args:
        rows: float32 [n, in], finite.
        group_size, symmetric: as in `formats.Int4`.
        search: whether to search for the clipping and to refine, or to cover the whole range.

    Returns:
        Nibbles uint8 [n, in] from 0 to 15 (the code + 8), scales bfloat16 [n, groups], zeros of the same form or None.
    """
    whole = rows.shape[1] // group_size * group_size
    # Equal groups together; what is left of each row is one more group, a shorter one.
    parts = [part for part in (rows[:, :whole], rows[:, whole:]) if part.shape[1]]
    chosen = [_choose(part, min(group_size, part.shape[1]), symmetric, search) for part in parts]
    nibbles, scales, zeros = (torch.cat(values, 1) for values in zip(*chosen, strict=True))
    return nibbles, scales, None if symmetric else zeros


def _choose(rows: torch.Tensor, group_size: int, symmetric: bool, search: bool) -> tuple[torch.Tensor, ...]:
    """As `choose`, for rows of whole groups."""
    grouped = rows.unflatten(1, (-1, group_size))
    best = _Best(grouped)
    for scale, zero in _candidates(grouped, symmetric, CLIPPINGS if search else CLIPPINGS[:1]):
        best.offer(scale, zero)
    for _ in range(REFINEMENTS if search else 0):
        best.offer(*_fit(grouped, best.codes(), best.scale, symmetric))
    nibbles = best.codes().add_(8).to(torch.uint8).flatten(1)
    return nibbles, best.scale[..., 0].bfloat16(), best.zero[..., 0].bfloat16()


def pack(nibbles: torch.Tensor) -> torch.Tensor:
    """uint8 [..., in] of values below 16 -> int8 [..., ceil(in / 2)]: even columns in the low four bits."""
    pairs = F.pad(nibbles, (0, nibbles.shape[-1] % 2)).unflatten(-1, (-1, 2))
    return (pairs[..., 0] | pairs[..., 1] << 4).view(torch.int8)


def unpack(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """int8 [..., ceil(in / 2)] -> codes from -8 to 7, int8 [..., in]."""
    both = torch.stack((packed & 15, (packed >> 4) & 15), -1)
    return both.flatten(-2)[..., :in_features] - 8


class _Best:
    """The scale and zero with the least squared error so far, for each group of [n, groups, group_size]."""

    scale: torch.Tensor
    zero: torch.Tensor
    error: torch.Tensor

    def __init__(self, grouped: torch.Tensor):
        self.grouped = grouped
        # Relative to the largest number, which keeps the squares of the largest and smallest numbers within float32.
        self.size = grouped.abs().amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        # What is computed on the way lies in the same memory each time: fresh memory costs more than the computing.
        self.work = torch.empty_like(grouped)
        self.offered = False

    def offer(self, scale: torch.Tensor, zero: torch.Tensor) -> None:
        """Take these, [n, groups, 1] each and exact in bfloat16, where their error is less."""
        values = self._codes(scale, zero).mul_(scale).add_(zero)
        error = values.sub_(self.grouped).div_(self.size).square_().sum(-1, keepdim=True)
        if not self.offered:
            self.scale, self.zero, self.error, self.offered = scale, zero, error, True
            return
        better = error < self.error
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)
        self.error = torch.where(better, error, self.error)

    def codes(self) -> torch.Tensor:
        """Whole numbers from -8 to 7 of the chosen scale and zero, float32 [n, groups, group_size].

        The next call of any method writes over them.
        """
        return self._codes(self.scale, self.zero)

    def _codes(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return torch.sub(self.grouped, zero, out=self.work).div_(scale).round_().clamp_(-8, 7)


def _candidates(grouped: torch.Tensor, symmetric: bool, clippings: tuple[float, ...]):
    """Yield scales and zeros [n, groups, 1] that cover so much of each group's range."""
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    largest = torch.maximum(high, -low)
    if symmetric:
        # There are eight codes below zero and seven above: the sign of the scale says which side has more.
        sign = torch.where(high >= largest, -1.0, 1.0)
        for clipping in clippings:
            for scale in (largest * clipping / 8 * sign, largest * clipping / 7):
                yield _scale(scale), torch.zeros_like(largest)
    else:
        for clipping in clippings:
            # Halved first: the range of the largest numbers is none. A scale far below the numbers would not reach
            # what the zero loses by its rounding.
            scale = _scale(torch.maximum((high / 2 - low / 2) * clipping / 7.5, largest / 256))
            yield scale, _bf16(low * clipping + 8 * scale)


def _fit(
    grouped: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least-squares scale and zero of the codes, [n, groups, 1]; the given scale where they do not tell one.

    `codes` are written over.
    """
    # The numbers relative to the scale are of the size of the codes, whatever the size of the weights.
    relative = grouped / scale
    if symmetric:
        top = relative.mul_(codes).sum(-1, keepdim=True)
        bottom = codes.square_().sum(-1, keepdim=True)
        zero = torch.zeros_like(top)
    else:
        mean, middle = relative.mean(-1, keepdim=True), codes.mean(-1, keepdim=True)
        codes.sub_(middle)
        top = relative.sub_(mean).mul_(codes).sum(-1, keepdim=True)
        bottom = codes.square_().sum(-1, keepdim=True)
    slope = torch.where((bottom > 0) & (top > 0), top / bottom, 1.0)
    fitted = _scale(scale * slope)
    if not symmetric:
        zero = _bf16((mean - middle * slope) * scale)
    return fitted, zero


def _scale(scale: torch.Tensor) -> torch.Tensor:
    """Exact in bfloat16, finite, and 1 where it would be 0 (a group of zeros)."""
    scale = _bf16(scale.clamp(-LARGEST, LARGEST))
    return torch.where(scale.abs() < torch.finfo(torch.float32).tiny, 1.0, scale)


def _bf16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()
