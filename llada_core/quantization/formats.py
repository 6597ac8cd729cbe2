"""How a quantized weight is stored: its tensors, how they are made from a dense weight and how it is made from them.

A weight is dense [..., out, in]: a linear layer's matrix, or the matrices of all experts with the experts first. A
format stores it as several tensors, each under a suffix of the layer's name:

| format | suffix | type | shape | a weight is |
|---|---|---|---|---|
| `Dense` | weight | any floating-point type | [..., out, in] | itself |
| `FP8Block` | weight | float8_e4m3fn | [..., out, in] | |
| | weight_scale_inv | float32 | [..., out blocks, in blocks] of 128 x 128 | weight x its block's scale |
| `Int8` | weight | int8 | [..., out, in] | |
| | weight_scale | float32 | [..., out, 1] | weight x its row's scale |
| `Int4` | weight | int8 | [..., out, ceil(in / 2)] | |
| | weight_scale | bfloat16 | [..., groups, out] | (nibble - 8) x scale + zero |
| | weight_zeros | bfloat16 | [..., groups, out], not where it is symmetric | |

FP8Block is the FP8 release as it is. Int8 is ComfyUI's `int8_tensorwise` with a scale a row, and Int4 with zeros its
`awq_w4a16` (two columns a byte, the even one in the low four bits): a file that has `comfy_quant` beside them, a uint8
tensor of the JSON that `metadata` returns, is read by the host too. The host has no form for blocks of FP8 (its own
has one scale a tensor), nor for 4 bits without zeros, which is `int4_symmetric` here, nor for a last group that is
cut short.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import torch

from ..errors import CheckpointError, InputError
from . import int4

Stored = Mapping[str, torch.Tensor]
Shape = tuple[int, ...]
Index = tuple[int | slice, ...]

# Beside the stored tensors, the JSON that says which format they are of.
METADATA_SUFFIX = "comfy_quant"
# Numbers that are quantized at a time: so many that starting a computation costs a GPU little, so few that they stay in
# the cache of a core.
CHUNK_ON_GPU, CHUNK_A_THREAD = 2**23, 2**18
FP8_MAX = 448.0


@dataclass(frozen=True)
class Format:
    """What all formats do. `shape` is a dense weight's, [..., out, in]."""

    name: ClassVar[str]

    def tensors(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        """Suffix -> shape and type of each stored tensor."""
        raise NotImplementedError

    def quantize(self, weight: torch.Tensor, label: str = "weight") -> dict[str, torch.Tensor]:
        """Floating-point [..., out, in] -> the stored tensors, where the weight lies.

        Raises InputError where a number is not finite; `label` names the weight there.
        """
        raise NotImplementedError

    def dequantize(self, stored: Stored, in_features: int, dtype: torch.dtype) -> torch.Tensor:
        """The stored tensors -> [..., out, in] of dtype."""
        raise NotImplementedError

    def place(self, shape: Shape, index: Index) -> dict[str, Index]:
        """Suffix -> where a piece of the weight lies in each stored tensor.

        Args:
            shape: [..., out, in] of the whole weight.
            index: the piece: an index or slice for each leading dimension, then perhaps a slice of rows; all of in.
        """
        raise NotImplementedError

    def metadata(self, shape: Shape) -> dict[str, object] | None:
        """What `comfy_quant` says beside a weight of this form; None where the stored tensors speak for themselves."""
        return None

    def bytes(self, shape: Shape) -> int:
        """Bytes of all stored tensors."""
        return sum(_numel(size) * dtype.itemsize for size, dtype in self.tensors(shape).values())

    def check(self, stored: Mapping[str, tuple[Shape, torch.dtype]], shape: Shape, label: str) -> None:
        """Raise CheckpointError unless these are the stored tensors of a weight of that shape."""
        for suffix, (wanted, dtype) in self.tensors(shape).items():
            expected = f"{suffix} of shape {list(wanted)}, {dtype}, for {self.name}"
            if suffix not in stored:
                raise CheckpointError(label, f"no {suffix}", expected, _CONVERT)
            found, kind = tuple(stored[suffix][0]), stored[suffix][1]
            if found != wanted or kind != dtype:
                raise CheckpointError(label, f"{suffix} of shape {list(found)}, {kind}", expected, _CONVERT)


@dataclass(frozen=True)
class Dense(Format):
    """The weight itself."""

    dtype: torch.dtype = torch.bfloat16
    name: ClassVar[str] = "dense"

    def tensors(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        return {"weight": (tuple(shape), self.dtype)}

    def quantize(self, weight: torch.Tensor, label: str = "weight") -> dict[str, torch.Tensor]:
        return {"weight": weight.to(self.dtype)}

    def dequantize(self, stored: Stored, in_features: int, dtype: torch.dtype) -> torch.Tensor:
        return stored["weight"].to(dtype)

    def place(self, shape: Shape, index: Index) -> dict[str, Index]:
        return {"weight": index}


@dataclass(frozen=True)
class FP8Block(Format):
    """float8_e4m3fn with a float32 scale a block of 128 x 128, as the FP8 release has it.

    Args:
        part_rows: where a weight is several released ones, one below the other (gate above up), the rows of each:
            blocks begin anew with each of them. 0 for a weight that is one.
    """

    part_rows: int = 0
    name: ClassVar[str] = "fp8_block"
    block: ClassVar[int] = 128

    def tensors(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        *lead, out, width = shape
        blocks = (out // self._part(out) * -(-self._part(out) // self.block), -(-width // self.block))
        return {
            "weight": (tuple(shape), torch.float8_e4m3fn),
            "weight_scale_inv": ((*lead, *blocks), torch.float32),
        }

    def quantize(self, weight: torch.Tensor, label: str = "weight") -> dict[str, torch.Tensor]:
        stored = _empty(self, weight)
        matrices = weight.flatten(0, -3) if weight.dim() > 2 else weight[None]
        scales = stored["weight_scale_inv"].view(len(matrices), *stored["weight_scale_inv"].shape[-2:])
        codes = stored["weight"].view(matrices.shape)
        together = max(1, _chunk(weight.device) // (self.block * weight.shape[-1]))  # as many matrices
        for first in range(0, len(matrices), together):
            some = slice(first, first + together)
            for row, (start, end) in enumerate(self._block_rows(weight.shape[-2])):
                rows = _finite(matrices[some, start:end], label)
                largest = _pad_columns(rows.abs().amax(-2), self.block).unflatten(-1, (-1, self.block)).amax(-1)
                scale = (largest / FP8_MAX).clamp_(min=_SMALLEST)
                scales[some, row] = scale
                scaled = rows / _spread(scale, self.block, rows.shape[-1])[:, None]
                codes[some, start:end] = scaled.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return stored

    def dequantize(self, stored: Stored, in_features: int, dtype: torch.dtype) -> torch.Tensor:
        scale, out = stored["weight_scale_inv"], stored["weight"].shape[-2]
        values = _fp8_to_float(stored["weight"])
        if self._part(out) % self.block or in_features % self.block:
            wide = _spread(scale, self.block, in_features)
            values *= wide[..., self.row_blocks(out, values.device), :]
        else:
            blocks = values.unflatten(-1, (-1, self.block)).unflatten(-3, (-1, self.block))
            blocks *= scale[..., :, None, :, None]
        return values.to(dtype)

    def place(self, shape: Shape, index: Index) -> dict[str, Index]:
        lead, rows = index[: len(shape) - 2], index[len(shape) - 2 :]
        if not rows or rows[0] == slice(None):
            return {"weight": index, "weight_scale_inv": lead}
        if not isinstance(rows[0], slice):
            raise ValueError(f"a single row of a matrix of {self.name} has no scales of its own")
        start, stop, _ = rows[0].indices(shape[-2])
        part = self._part(shape[-2])
        per_part = -(-part // self.block)

        def block(row: int) -> int:
            whole, rest = divmod(row, part)
            if rest % self.block:
                found = f"rows {start} to {stop} of {shape[-2]}"
                raise InputError("piece of an fp8_block weight", found, "whole blocks", "Quantize whole weights.")
            return whole * per_part + rest // self.block

        blocks = slice(block(start), block(stop) if stop % part else -(-stop // part) * per_part)
        return {"weight": index, "weight_scale_inv": (*lead, blocks)}

    def row_blocks(self, out_features: int, device: torch.device | None = None) -> torch.Tensor:
        """For each row of a weight, which row of scales is its own: int64 [out]."""
        part = self._part(out_features)
        row = torch.arange(out_features, device=device)
        return row // part * -(-part // self.block) + row % part // self.block

    def _part(self, out_features: int) -> int:
        part = self.part_rows or out_features
        if part < 1 or out_features % part:
            raise InputError("part_rows", part, f"a divisor of {out_features} rows", "Choose one.")
        return part

    def _block_rows(self, out_features: int) -> list[tuple[int, int]]:
        """First and one behind the last row of each row of blocks."""
        part = self._part(out_features)
        return [
            (first + start, first + min(start + self.block, part))
            for first in range(0, out_features, part)
            for start in range(0, part, self.block)
        ]


@dataclass(frozen=True)
class Int8(Format):
    """int8 with a float32 scale a row: symmetric, the largest number of a row becomes 127."""

    name: ClassVar[str] = "int8"
    host_format: ClassVar[str] = "int8_tensorwise"

    def tensors(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        return {
            "weight": (tuple(shape), torch.int8),
            "weight_scale": ((*shape[:-1], 1), torch.float32),
        }

    def quantize(self, weight: torch.Tensor, label: str = "weight") -> dict[str, torch.Tensor]:
        stored = _empty(self, weight)
        codes, scales = stored["weight"].view(-1, weight.shape[-1]), stored["weight_scale"].view(-1, 1)
        for chunk, rows in _chunks(weight, label):
            # A row of the largest numbers must not become infinite when it is read back.
            scale = (rows.abs().amax(-1, keepdim=True) / 127).clamp_(_SMALLEST, torch.finfo(torch.float32).max / 128)
            scales[chunk] = scale
            codes[chunk] = (rows / scale).round_().clamp_(-127, 127).to(torch.int8)
        return stored

    def dequantize(self, stored: Stored, in_features: int, dtype: torch.dtype) -> torch.Tensor:
        dense = torch.empty(stored["weight"].shape, dtype=dtype, device=stored["weight"].device)
        return torch.mul(stored["weight"], stored["weight_scale"], out=dense)  # one pass, in float32 inside

    def place(self, shape: Shape, index: Index) -> dict[str, Index]:
        return {"weight": index, "weight_scale": index}

    def metadata(self, shape: Shape) -> dict[str, object]:
        return {"format": self.host_format, **_experts(shape)}


@dataclass(frozen=True)
class Int4(Format):
    """4 bits, a bfloat16 scale and, unless symmetric, a bfloat16 zero a group of columns of a row.

    Args:
        group_size: columns of a group: 64 or 128. The last group of a row is shorter where they do not divide it.
        symmetric: without zeros: 0.25 (groups of 64) or 0.125 bits a weight less, and a larger error.
        search: how scales and zeros are chosen: by the error of the group on a grid of clippings, or (False) so that
            nothing is clipped. The stored form is the same.
    """

    group_size: int = 64
    symmetric: bool = False
    search: bool = field(default=True, compare=False)
    name: ClassVar[str] = "int4"
    host_format: ClassVar[str] = "awq_w4a16"
    symmetric_format: ClassVar[str] = "int4_symmetric"

    def __post_init__(self):
        if self.group_size not in (64, 128):
            raise InputError("group_size", self.group_size, "64 or 128", "Choose one of these.")

    def groups(self, in_features: int) -> int:
        """Groups of a row."""
        return -(-in_features // self.group_size)

    def tensors(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        *lead, out, width = shape
        sizes = ((*lead, self.groups(width), out), torch.bfloat16)
        stored = {"weight": ((*lead, out, -(-width // 2)), torch.int8), "weight_scale": sizes}
        return stored if self.symmetric else stored | {"weight_zeros": sizes}

    def quantize(self, weight: torch.Tensor, label: str = "weight") -> dict[str, torch.Tensor]:
        stored = _empty(self, weight)
        packed = stored["weight"].view(-1, stored["weight"].shape[-1])
        # The groups come last while they are computed: [..., out, groups].
        parts = {name: value.mT.contiguous() for name, value in stored.items() if name != "weight"}
        flat = {name: value.view(-1, value.shape[-1]) for name, value in parts.items()}
        for chunk, rows in _chunks(weight, label):
            nibbles, scale, zeros = int4.choose(rows, self.group_size, self.symmetric, self.search)
            packed[chunk] = int4.pack(nibbles)
            flat["weight_scale"][chunk] = scale
            if zeros is not None:
                flat["weight_zeros"][chunk] = zeros
        for name, value in parts.items():
            stored[name].copy_(value.mT)
        return stored

    def dequantize(self, stored: Stored, in_features: int, dtype: torch.dtype) -> torch.Tensor:
        values = int4.unpack(stored["weight"], in_features).float()
        values *= _spread(stored["weight_scale"].mT.float(), self.group_size, in_features)
        if not self.symmetric:
            values += _spread(stored["weight_zeros"].mT.float(), self.group_size, in_features)
        return values.to(dtype)

    def place(self, shape: Shape, index: Index) -> dict[str, Index]:
        lead, rows = index[: len(shape) - 2], index[len(shape) - 2 :]
        sizes = (*lead, slice(None), *rows) if rows else lead
        return {"weight": index} | dict.fromkeys(list(self.tensors(shape))[1:], sizes)

    def metadata(self, shape: Shape) -> dict[str, object]:
        kind = self.symmetric_format if self.symmetric else self.host_format
        return {"format": kind, "group_size": self.group_size} | _experts(shape)


_CONVERT = "Download the checkpoint again, or convert it again from the one that it was made from."
# Rows and blocks of smaller numbers than this times the largest code become 0.
_SMALLEST = 1e-30


def format_of(metadata: Mapping[str, object], label: str) -> Format:
    """The format that `comfy_quant` names. Raises CheckpointError for one that is not read here."""
    kind = metadata.get("format")
    if kind == Int8.host_format and not metadata.get("convrot"):
        return Int8()
    size = metadata.get("group_size", 64)
    if kind in (Int4.host_format, Int4.symmetric_format) and isinstance(size, int) and size in (64, 128):
        return Int4(size, kind == Int4.symmetric_format)
    known = f"{Int8.host_format}, {Int4.host_format} or {Int4.symmetric_format} with groups of 64 or 128"
    raise CheckpointError(label, f"the format {json.dumps(dict(metadata))}", known, _CONVERT)


def encode_metadata(metadata: Mapping[str, object]) -> torch.Tensor:
    """JSON as the uint8 tensor that `comfy_quant` is."""
    return torch.tensor(list(json.dumps(metadata).encode()), dtype=torch.uint8)


def decode_metadata(tensor: torch.Tensor, label: str) -> dict[str, object]:
    """What `comfy_quant` says. Raises CheckpointError where it is no JSON object."""
    try:
        value = json.loads(bytes(tensor.flatten().tolist()))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(label, f"an unreadable {METADATA_SUFFIX} ({error})", "JSON as bytes", _CONVERT) from error
    if not isinstance(value, dict):
        raise CheckpointError(label, f"{METADATA_SUFFIX} = {type(value).__name__}", "a JSON object", _CONVERT)
    return value


def describe(form: Format) -> str:
    """A format in a word or two, for logs: "int4, group_size 64, symmetric False"."""
    return ", ".join([form.name, *(f"{name} {value}" for name, value in asdict(form).items())])


def _experts(shape: Shape) -> dict[str, int]:
    return {"num_experts": shape[0]} if len(shape) == 3 else {}


def _numel(shape: Shape) -> int:
    return torch.Size(shape).numel()


def _empty(form: Format, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = form.tensors(tuple(weight.shape))
    return {name: torch.empty(shape, dtype=dtype, device=weight.device) for name, (shape, dtype) in tensors.items()}


def _finite(rows: torch.Tensor, label: str) -> torch.Tensor:
    rows = rows.float()
    # No sum with a number that is not finite is finite. Looking at each takes longer, and is for sums too large.
    if not bool(rows.sum().isfinite()) and not bool(rows.isfinite().all()):
        bad = int((~rows.isfinite()).sum())
        remedy = "The file is damaged, or of a training that failed: download it again."
        raise InputError(label, f"{bad} numbers that are NaN or infinite", "finite numbers", remedy)
    return rows


def _chunk(device: torch.device) -> int:
    """How many numbers are quantized at a time there."""
    return CHUNK_A_THREAD * torch.get_num_threads() if device.type == "cpu" else CHUNK_ON_GPU


def _chunks(weight: torch.Tensor, label: str):
    """Yield (slice of rows, those rows as float32) of a weight seen as [rows, in], some at a time."""
    rows = weight.reshape(-1, weight.shape[-1])
    step = max(1, _chunk(weight.device) // weight.shape[-1])
    for start in range(0, len(rows), step):
        yield slice(start, start + step), _finite(rows[start : start + step], label)


def _fp8_to_float(codes: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn -> float32, exactly.

    torch converts them one by one on a CPU, 3 s for 10^9 of them; moved to where bfloat16 has its exponent and mantissa
    they are the same numbers times 2^-120. Only NaN is then another number.
    """
    signed = codes.view(torch.int8)
    if codes.device.type != "cpu" or not codes.numel() or int((signed & 127).amax()) == 127:
        return codes.float()
    sign_and_seven = torch.tensor(-0x7810, dtype=torch.int16)  # bits 15 and 4 to 10
    bits = signed.to(torch.int16).bitwise_left_shift_(4).bitwise_and_(sign_and_seven)
    return bits.view(torch.bfloat16).float().mul_(2.0**120)


def _pad_columns(x: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % size))


def _spread(values: torch.Tensor, size: int, width: int) -> torch.Tensor:
    """[..., groups] -> [..., width], each value `size` times."""
    return values.repeat_interleave(size, -1)[..., :width]
