"""What a node shows while it works: the token grid filling in, latents as a small picture, text as it is written."""

import logging
import time
from collections.abc import Callable

import numpy as np
import torch
from comfy.cli_args import LatentPreviewMethod, args
from PIL import Image

from ...llada_core.progress import TokenPreview

log = logging.getLogger(__name__)

SHARE = 0.01  # of a run's time that previews may take
GRID_PIXELS = 256  # longer side of a drawn token grid: larger costs more than it shows
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

    def run(self, work: Callable[[], object], always: bool = False) -> object | None:
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
    """

    def __init__(self, palette: Callable[[], torch.Tensor | None], device: torch.device):
        self._palette, self._device = palette, device
        self._colours: np.ndarray | None = None
        self._latents = None

    @staticmethod
    def wanted() -> bool:
        """Whether the host has previews on; it may change from run to run."""
        return args.preview_method != LatentPreviewMethod.NoPreviews

    def draw(self, shown: object) -> HostPreview | None:
        """The host's form of a preview: of a TokenPreview or of latents [1, 16, h, w]."""
        return self._grid(shown.codes) if isinstance(shown, TokenPreview) else self._latent(shown)

    def _grid(self, codes: torch.Tensor) -> HostPreview | None:
        if self._colours is None:
            palette = self._palette()
            if palette is None:
                return None
            self._colours = palette.numpy()
        return "JPEG", draw_grid(codes.numpy(), self._colours), None

    def _latent(self, latents: torch.Tensor) -> HostPreview | None:
        if self._latents is None:
            import latent_preview
            from comfy.latent_formats import Flux

            self._latents = latent_preview.get_previewer(self._device, Flux())
        return self._latents.decode_latent_to_preview_image("JPEG", latents.float())


def draw_grid(codes: np.ndarray, colours: np.ndarray) -> Image.Image:
    """A picture of a token grid: a coloured cell for each code, a hatched one where masked.

    Args:
        codes: int [h, w], -1 where masked.
        colours: uint8 [codes, 3].
    """
    cell = max(GRID_PIXELS // max(codes.shape), 2)
    cells = np.where(codes[..., None] < 0, 0, colours[codes]).astype(np.uint8)
    picture = cells.repeat(cell, 0).repeat(cell, 1)
    masked = (codes < 0).repeat(cell, 0).repeat(cell, 1)
    rows, columns = np.ogrid[: masked.shape[0], : masked.shape[1]]
    hatched = np.where((rows + columns) % 8 < 2, np.uint8(HATCHING), np.uint8(MASKED))
    return Image.fromarray(np.where(masked[..., None], hatched[..., None], picture))
