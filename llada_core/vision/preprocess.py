"""Images -> pixels as the vision tower takes them: which size, how to get there, how values are scaled.

docs/model.md, Image preprocessing. Sizes are (height, width) in pixels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..checks import check_choice, check_count, check_numbers
from ..errors import CheckpointError, InputError

ALIGN = 32  # every side is a multiple of this: two patches, as the 2x decoder was trained
MAX_EDIT_RATIO = 4  # of the sides of an edit's candidate sizes
MAX_RATIO = 200  # of the sides of any image; beyond it, covering an aligned size takes gigabytes
MAX_PIXELS = 4096**2
BAND = 256  # rows of an image that become 8-bit together
MAX_IMAGE = 2**28  # pixels of an image before resizing, 16,384 each way; a tensor of strides 0 may claim any number
OVERSHOOT = 1.0  # how far sharp resizing may push a value outside 0...1; beyond, it is no image in 0...1 at all

PREPROCESSOR = "image_tokenizer: preprocessor_config.json"
Size = tuple[int, int]


@dataclass(frozen=True)
class PixelBudgets:
    """How many pixels an image may have once resized; the release's values by default.

    Attributes:
        understand_min, understand_max: bounds for a single image that is to be understood.
        several_max: upper bound for each of several such images.
        edit: upper bound for a reference image of an edit.

    Raises:
        InputError: a budget that is no whole number from 32² to 4096², or a minimum above its maximum.
    """

    understand_min: int = 128**2
    understand_max: int = 800**2
    several_max: int = 448**2
    edit: int = 512**2

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or not ALIGN**2 <= value <= MAX_PIXELS:
                expected = f"a whole number of pixels from {ALIGN**2} to {MAX_PIXELS}"
                raise InputError(f"pixel_budgets.{field.name}", repr(value), expected, "Choose one in that range.")
        if self.understand_min > min(self.understand_max, self.several_max):
            found = f"{self.understand_min} above a maximum"
            expected = "at most understand_max and several_max"
            raise InputError("pixel_budgets.understand_min", found, expected, "Lower it.")

    @classmethod
    def from_config(cls, preprocessor_config: Mapping[str, Any]) -> "PixelBudgets":
        """Budgets of a checkpoint: `pixel_budgets` of preprocessor_config.json over the release's.

        Raises:
            CheckpointError: `pixel_budgets` is no object, or holds an unknown name or a value out of range.
        """
        given = preprocessor_config.get("pixel_budgets", {})
        names = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or set(given) - set(names):
            expected = "pixel_budgets with nothing but " + ", ".join(names)
            raise CheckpointError(PREPROCESSOR, f"pixel_budgets {given!r}", expected, "Correct or remove the field.")
        try:
            return cls(**given)
        except InputError as error:
            raise CheckpointError(PREPROCESSOR, str(error), "budgets in range", "Correct the field.") from error


@dataclass(frozen=True)
class Normalisation:
    """How 8-bit values become the tower's: ×rescale, then (x - mean) / std, a mean and a std per channel."""

    rescale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def from_config(cls, preprocessor_config: Mapping[str, Any]) -> "Normalisation":
        """Read rescale_factor, image_mean and image_std, as far as do_rescale and do_normalize ask for them.

        Raises:
            CheckpointError: a value that is no finite number, not three per channel list, or a std that is not > 0.
        """
        rescale, mean, std = cls.rescale, cls.mean, cls.std
        if preprocessor_config.get("do_rescale", True):
            rescale = preprocessor_config.get("rescale_factor", rescale)
        else:
            rescale = 1.0
        if preprocessor_config.get("do_normalize", True):
            mean = preprocessor_config.get("image_mean", mean)
            std = preprocessor_config.get("image_std", std)
        else:
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        try:
            values = cls(float(rescale), tuple(map(float, mean)), tuple(map(float, std)))
        except (TypeError, ValueError):
            values = None
        if (
            values is None
            or len(values.mean) != 3
            or len(values.std) != 3
            or min(values.std) <= 0
            or not all(map(math.isfinite, (values.rescale, *values.mean, *values.std)))
        ):
            found = f"rescale_factor {rescale!r}, image_mean {mean!r}, image_std {std!r}"
            expected = "a finite factor, three finite means and three deviations above 0"
            raise CheckpointError(PREPROCESSOR, found, expected, "Download preprocessor_config.json again.")
        return values

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 [3, H, W], values 0...255 -> float32 [3, H, W] as the vision tower takes them."""
        mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (self.mean, self.std))
        return (pixels * self.rescale - mean) / std


def understand_target(size: Size, minimum: int, maximum: int) -> Size:
    """The aligned size near `size` with an area of `minimum` to `maximum` pixels, as far as 32-pixel steps allow."""
    target = [max(ALIGN, round(side / ALIGN) * ALIGN) for side in size]
    area = math.prod(target)
    if area > maximum:
        scale = math.sqrt(maximum / math.prod(size))
        target = [max(ALIGN, math.floor(side * scale / ALIGN) * ALIGN) for side in size]
    elif area < minimum:
        scale = math.sqrt(minimum / math.prod(size))
        target = [math.ceil(side * scale / ALIGN) * ALIGN for side in size]
    return target[0], target[1]


def cover(size: Size, target: Size) -> Size:
    """`size` scaled, proportions kept, until it just covers `target`."""
    scale = max(wanted / side for side, wanted in zip(size, target, strict=True))
    height, width = (max(wanted, round(side * scale)) for side, wanted in zip(size, target, strict=True))
    return height, width


def understand_size(size: Size, minimum: int, maximum: int) -> Size:
    """The size that an image of `size` is understood at: what covers the target, cut down to multiples of 32."""
    height, width = cover(size, understand_target(size, minimum, maximum))
    return height // ALIGN * ALIGN, width // ALIGN * ALIGN


def edit_sizes(maximum: int) -> list[Size]:
    """Every size that a reference of an edit may have under a budget of `maximum` pixels, widest first."""
    cells = maximum // ALIGN**2
    sizes, columns, rows = [], cells, 1
    while columns:
        if max(columns, rows) <= MAX_EDIT_RATIO * min(columns, rows):
            sizes.append((rows * ALIGN, columns * ALIGN))
        if columns * (rows + 1) <= cells:
            rows += 1
        else:
            columns -= 1
    return sizes


def edit_size(size: Size, maximum: int) -> Size:
    """The candidate of `edit_sizes` whose proportions lose least of `size`; of equals the wider, then the higher."""

    def kept(candidate: Size) -> tuple[float, int, int]:
        down, across = candidate[0] / size[0], candidate[1] / size[1]
        return min(across, down) / max(across, down), candidate[1], candidate[0]

    return max(edit_sizes(maximum), key=kept)


def check_image(image: torch.Tensor) -> None:
    """Raise InputError unless an image is float [H, W, 3 or 4] in 0...1.

    A side of 0, sides more than 200:1 apart, more than 268 million pixels, or values that are not finite or far outside
    0...1 are refused; a little outside, as sharp resizing leaves them, they pass.
    """
    expected = "a float image [height, width, 3 or 4]"
    check_numbers("image", image, expected, "Hand over one image at a time, values 0 to 1.")
    if not image.is_floating_point() or image.ndim != 3:
        found = f"{image.dtype} {list(image.shape)}"
        raise InputError("image", found, expected, "Hand over one image at a time, values 0 to 1.")
    if image.shape[2] not in (3, 4):
        remedy = "Convert the image to RGB first; a mask is not an image."
        raise InputError("image", f"{image.shape[2]} channel(s)", expected, remedy)
    height, width = image.shape[:2]
    if min(height, width) == 0 or max(height, width) > MAX_RATIO * min(height, width):
        found = f"{width}x{height} pixels"
        raise InputError("image", found, f"sides of at least 1 pixel and at most {MAX_RATIO}:1", "Crop or resize it.")
    if height * width > MAX_IMAGE:
        raise InputError("image", f"{width}x{height} pixels", f"at most {MAX_IMAGE} pixels", "Crop or resize it.")
    bounds = torch.stack([torch.stack(band.detach().float().aminmax()).cpu() for band in image.split(BAND)])
    low, high = float(bounds.amin()), float(bounds.amax())  # both NaN where there is one
    if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):
        found = f"values from {low:g} to {high:g}"
        remedy = "Scale or clamp the image to 0 to 1; if it holds NaN, the step before this one failed."
        raise InputError("image", found, "values from 0 to 1", remedy)


def to_picture(image: torch.Tensor) -> Image.Image:
    """One float image [H, W, 3 or 4] in 0...1 -> 8-bit RGB, transparency composited over white.

    Raises InputError as `check_image` does.
    """
    check_image(image)
    eight_bit = np.empty(tuple(image.shape), np.uint8)  # band by band: whole, it takes twice the image beside it
    for top in range(0, len(image), BAND):
        values = image[top : top + BAND].detach().to("cpu", torch.float32)
        eight_bit[top : top + BAND] = (values * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    picture = Image.fromarray(eight_bit)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def to_pixels(picture: Image.Image) -> torch.Tensor:
    """8-bit RGB -> float32 [3, H, W], values 0...255."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(torch.float32)


def prepare(
    image: torch.Tensor,
    purpose: str = "edit",
    fit: str = "cover",
    budgets: PixelBudgets | None = None,
    several: bool = False,
    pixels: int = 0,
) -> torch.Tensor:
    """Bring one image to the size that its purpose asks for (docs/model.md, Image preprocessing).

    Args:
        image: float [H, W, C] in 0...1; C is 3, or 4 with transparency, which is composited over white.
        purpose: "edit" (a reference of an edit) or "understand" (a question about the image).
        fit: for edits, how a chosen size is reached: "cover" resizes, so that the scene is kept, then crops the
            middle; "crop" takes the middle as it is, as the reference implementation does, with black added below
            and to the right where the image is smaller. Understanding always resizes.
        budgets: the checkpoint's; None for the release's.
        several: the image is one of several to be understood together, and gets the smaller budget.
        pixels: an upper bound in pixels in place of the budget's, 32² to 4096²; 0 keeps the budget's.

    Returns:
        float32 [3, H, W], values 0...255 in 8-bit steps, H and W multiples of 32. `Normalisation` comes next.

    Raises:
        InputError: an image that cannot be used (see `to_picture`), or another argument out of range.
    """
    check_way(purpose, fit, pixels)
    budgets = budgets or PixelBudgets()
    picture = to_picture(image)
    size = (picture.height, picture.width)
    chosen = prepared_size(size, purpose, budgets, several, pixels)
    if purpose == "understand":
        picture = _resize(picture, cover(size, understand_target(size, *_bounds(budgets, several, pixels))))
    elif fit == "cover":
        picture = _resize(picture, cover(size, chosen))
    return to_pixels(_crop_middle(picture, chosen))


def check_way(purpose: str, fit: str, pixels: int) -> None:
    """Raise InputError unless these are what `prepare` takes."""
    check_choice("purpose", purpose, ("edit", "understand"))
    check_choice("fit", fit, ("cover", "crop"))
    check_count("pixels", pixels, 0, MAX_PIXELS, "Use 0 for the checkpoint's own budget.")
    if pixels:
        check_count("pixels", pixels, ALIGN**2, MAX_PIXELS, "Use 0 for the checkpoint's own budget.")


def prepared_size(size: Size, purpose: str, budgets: PixelBudgets, several: bool, pixels: int) -> Size:
    """The size to which `prepare` brings an image of `size`; the other arguments are its own."""
    if purpose == "understand":
        return understand_size(size, *_bounds(budgets, several, pixels))
    return edit_size(size, pixels or budgets.edit)


def _bounds(budgets: PixelBudgets, several: bool, pixels: int) -> tuple[int, int]:
    """The least and the most pixels of an image that is to be understood."""
    maximum = pixels or (budgets.several_max if several else budgets.understand_max)
    return min(budgets.understand_min, maximum), maximum


def check_batch(images: torch.Tensor) -> None:
    """Raise InputError unless images are a batch [batch, H, W, C] of at least one that `check_image` passes."""
    expected, remedy = "a batch [batch, height, width, channels]", "Connect at least one image."
    check_numbers("image", images, expected, remedy)
    if images.ndim != 4 or images.shape[0] == 0:
        raise InputError("image", f"shape {list(images.shape)}", expected, remedy)
    for image in images:
        check_image(image)


def _resize(picture: Image.Image, size: Size) -> Image.Image:
    # Pillow's own bicubic, on 8 bits: tokens depend on the filter, and this is the reference's.
    height, width = size
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.BICUBIC)


def _crop_middle(picture: Image.Image, size: Size) -> Image.Image:
    height, width = size
    left, top = max(0, (picture.width - width) // 2), max(0, (picture.height - height) // 2)
    return picture.crop((left, top, left + width, top + height))  # Pillow fills what lies outside with black
