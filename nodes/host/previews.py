"""What a node shows while it works: the token grid filling in, latents as a small picture, text as it is written."""

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from comfy.cli_args import LatentPreviewMethod, args
from PIL import Image

from ...llada_core.preview_colours import latent_colours
from ...llada_core.progress import TokenPreview

log = logging.getLogger(__name__)

Result = TypeVar("Result")

SHARE = 0.01  # of a run's time that previews may take
CELL = 32  # pixels of a token in the decoded picture, each way
MOST_PIXELS = 2048  # longer side of a preview; smaller ones have the size of the picture, for the host shows their size
MASKED, HATCHING = 44, 72  # grey levels of cells that are still masked

HostPreview = tuple[str, Image.Image, int | None]


class Throttle:
    """Lets work through while it has taken less than a share of the time since it was created.

    Args:
        share: 0...1.
        clock: seconds, rising.
    """

    def __init__(self, share: float = SHARE, clock: Callable[[], float] = time.perf_counter):
        self._share, self._clock = share, clock
        self._began, self._spent = clock(), 0.0

    def run(self, work: Callable[[], Result], always: bool = False) -> Result | None:
        """What `work` returns, or None where it is not its turn. The first time is, and where `always` says so."""
        now = self._clock()
        if not always and self._spent > self._share * (now - self._began):
            return None
        result = work()
        self._spent += self._clock() - now
        return result


class Previewer:
    """Draws previews for one run of one node, where the host has previews on.

    Args:
        palette: -> uint8 [codes, 3], a colour for each image code, or None where there is none; called at most once.
        device: where latents are.
        latent_colours: float32 [channels + 1, 3], the map from latents to colours; None where no latents are shown.
    """

    def __init__(
        self, palette: Callable[[], torch.Tensor | None], device: torch.device, latent_colours: torch.Tensor | None
    ):
        self._palette, self._device, self._latent_colours = palette, device, latent_colours
        self._colours: np.ndarray | None = None
        self._taesd: Any = None

    @staticmethod
    def wanted() -> bool:
        """Whether the host has previews on; it may change from run to run."""
        return args.preview_method != LatentPreviewMethod.NoPreviews

    def draw(self, shown: TokenPreview | torch.Tensor) -> HostPreview | None:
        """The host's form of a preview: of a TokenPreview or of latents [1, 16, h, w]."""
        picture = self._grid(shown.codes) if isinstance(shown, TokenPreview) else self._latent(shown)
        return None if picture is None else ("JPEG", picture, None)

    def _grid(self, codes: torch.Tensor) -> Image.Image | None:
        if self._colours is None:
            palette = self._palette()
            if palette is None:
                return None
            self._colours = palette.numpy()
        return draw_grid(codes.numpy(), self._colours)

    def _latent(self, latents: torch.Tensor) -> Image.Image | None:
        if args.preview_method == LatentPreviewMethod.TAESD:
            if self._taesd is None:
                import latent_preview
                from comfy.latent_formats import Flux

                self._taesd = latent_preview.get_previewer(self._device, Flux())
            return self._taesd.decode_latent_to_preview_image("JPEG", latents.float())[1]
        if self._latent_colours is None:
            return None
        picture = Image.fromarray(latent_colours(latents, self._latent_colours).numpy())
        return picture.resize(_shown_size(*(8 * side for side in picture.size)), Image.Resampling.BILINEAR)


def picture_preview(image: torch.Tensor) -> HostPreview:
    """The host's form of a finished picture, float [height, width, 3] in 0...1."""
    picture = Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).numpy())
    return "JPEG", picture.resize(_shown_size(*picture.size)), None


def _shown_size(width: int, height: int) -> tuple[int, int]:
    scale = min(MOST_PIXELS / max(width, height), 1.0)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def draw_grid(codes: np.ndarray, colours: np.ndarray) -> Image.Image:
    """A picture of a token grid: a coloured cell for each code, a hatched one where masked.

    Args:
        codes: int [h, w], -1 where masked.
        colours: uint8 [codes, 3].
    """
    cell = max(min(CELL, MOST_PIXELS // max(codes.shape)), 1)
    cells = np.where(codes[..., None] < 0, 0, colours[codes]).astype(np.uint8)
    picture = cells.repeat(cell, 0).repeat(cell, 1)
    masked = (codes < 0).repeat(cell, 0).repeat(cell, 1)
    rows, columns = np.ogrid[: masked.shape[0], : masked.shape[1]]
    hatched = np.where((rows + columns) % 8 < 2, np.uint8(HATCHING), np.uint8(MASKED))
    return Image.fromarray(np.where(masked[..., None], hatched[..., None], picture))
