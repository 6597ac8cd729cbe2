"""ImageTokens: the value that travels between nodes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import InputError, shown

PATCH = 16  # pixels an image token covers, each way (docs/model.md, Parts)
CODEBOOK_DIGITS = 7  # of a codebook's size; the released one has 16,384 codes
# Far above what fits into a context; below, what is computed from tokens stays in proportion to a machine's memory.
MOST_GRIDS = 4096
MOST_CELLS = 2**22  # of all grids
UPSAMPLING = 2  # the decoder's factor (docs/model.md, Parts)


@dataclass(frozen=True)
class ImageTokens:
    """One or several images as grids of discrete codes.

    Attributes:
        grids: int64 tensors [h, w], one an image, codes 0...codebook_size - 1, on the CPU; sizes may differ.
        codebook_size: number of codes of the quantizer that the codes belong to.

    Raises:
        InputError: no grid, more than 4096, more than 2**22 tokens in all, a grid that is not a non-empty int64
            [h, w], or a code outside the codebook.
    """

    grids: tuple[torch.Tensor, ...]
    codebook_size: int

    def __post_init__(self):
        if not self.grids:
            raise InputError("tokens", "no image", "at least one token grid", "Encode or sample an image first.")
        check_extent("tokens", [tuple(grid.shape) for grid in self.grids])
        for i, grid in enumerate(self.grids):
            name = f"tokens[{i}]"
            if grid.dtype != torch.int64 or grid.ndim != 2 or grid.numel() == 0:
                found = f"{grid.dtype} of shape {list(grid.shape)}"
                raise InputError(name, found, "a non-empty int64 grid [h, w]", "Encode or sample the image again.")
            low, high = int(grid.min()), int(grid.max())
            if low < 0 or high >= self.codebook_size:
                raise InputError(
                    name,
                    f"codes from {low} to {high}",
                    f"codes from 0 to {self.codebook_size - 1}",
                    "These tokens were not made with this codebook; encode the image again.",
                )

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(h, w) of every grid, in tokens."""
        return [(grid.shape[0], grid.shape[1]) for grid in self.grids]

    def for_codebook(self, codebook_size: int) -> "ImageTokens":
        """Return self, or raise InputError where the tokens belong to a codebook of another size."""
        if codebook_size != self.codebook_size:
            raise InputError(
                "tokens",
                f"codes of a codebook of {self.codebook_size}",
                f"codes of this checkpoint's codebook of {codebook_size}",
                "Encode the image with the checkpoint that is to use it.",
            )
        return self


def check_extent(name: str, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise InputError where there are more grids than anybody needs, or more tokens in all."""
    if len(shapes) > MOST_GRIDS:
        raise InputError(name, f"{len(shapes)} images", f"at most {MOST_GRIDS}", "Take fewer images at a time.")
    cells = sum(map(math.prod, shapes))
    if cells > MOST_CELLS:
        raise InputError(name, f"{cells} tokens in all", f"at most {MOST_CELLS}", "Take fewer or smaller images.")


def join(parts: Sequence[ImageTokens]) -> ImageTokens:
    """All images of all parts, in order. Raises InputError where codebooks differ or there is no part."""
    if not parts:
        raise InputError("tokens", "nothing", "at least one set of image tokens", "Connect image tokens.")
    check_extent("tokens", [size for part in parts for size in part.sizes])
    grids = tuple(grid for part in parts for grid in part.for_codebook(parts[0].codebook_size).grids)
    return ImageTokens(grids, parts[0].codebook_size)


def save_tokens(tokens: ImageTokens, path: Path) -> None:
    """Write a token file: safetensors with tensors "0", "1", ... int64 [h, w] and metadata codebook_size.

    Raises InputError where it cannot be written.
    """
    # Clones: safetensors refuses tensors that share memory, as they do where an image is joined with itself.
    tensors = {str(i): grid.contiguous().clone() for i, grid in enumerate(tokens.grids)}
    try:
        save_file(tensors, str(path), metadata={"codebook_size": str(tokens.codebook_size)})
    except (SafetensorError, OSError) as error:
        remedy = "Choose another name, or make room; the tokens are still there for another run."
        raise InputError(path.name, f"a file that cannot be written ({error})", "room for it", remedy) from error


def load_tokens(path: Path) -> ImageTokens:
    """Read a token file back. Raises InputError where it is none, is damaged, or holds codes outside its codebook."""
    remedy = "Choose a file written by Save Image Tokens."
    try:
        if not path.is_file():
            raise FileNotFoundError("there is none of that name")
        with safe_open(str(path), framework="pt") as file:
            size = (file.metadata() or {}).get("codebook_size", "")
            names = sorted(file.keys(), key=lambda name: (len(name), name))
            if not size.isdecimal() or len(size) > CODEBOOK_DIGITS or names != [str(i) for i in range(len(names))]:
                found = f"tensors {shown(names[:4])} and codebook_size {shown(size)}"
                raise InputError(path.name, found, 'tensors "0", "1", ... and a codebook_size', remedy)
            check_extent(path.name, [tuple(file.get_slice(name).get_shape()) for name in names])
            grids = tuple(file.get_tensor(name) for name in names)
    except (SafetensorError, OSError) as error:
        raise InputError(path.name, f"an unreadable file ({error})", "a safetensors token file", remedy) from error
    return ImageTokens(grids, int(size))
