"""What a conversion makes of a checkpoint."""

from dataclasses import asdict, dataclass

from ..checks import check_choice
from ..errors import InputError
from ..quantization.choices import FORMS
from ..quantization.formats import Format

BACKBONE_FORMS = ("int4", "int4-128", "int8", "fp8", "keep")
PIXEL_FORMS = ("int8", "keep")
# A checkpoint's parts; the first is always needed.
PARTS = ("backbone", "image_tokenizer", "sigvq", "decoder", "decoder-turbo", "vae")


@dataclass(frozen=True)
class Conversion:
    """The choices of a conversion.

    Attributes:
        backbone: "int4" (groups of 64, with zeros), "int4-128" (groups of 128 without: smaller, faster, less exact),
            "int8", "fp8" (blocks of 128 x 128, as the FP8 release), or "keep".
        decoder: of both decoders, "int8" or "keep".
        vision: of SigLIP-VQ, "int8" or "keep".
        parts: those that the new folder has, of those that the old one has; None means all.
    """

    backbone: str = "int4"
    decoder: str = "int8"
    vision: str = "keep"
    parts: tuple[str, ...] | None = None

    def __post_init__(self):
        check_choice("backbone", self.backbone, BACKBONE_FORMS)
        check_choice("decoder", self.decoder, PIXEL_FORMS)
        check_choice("vision", self.vision, PIXEL_FORMS)
        for part in self.parts or ():
            check_choice("parts", part, PARTS)
        if self.parts is not None and PARTS[0] not in self.parts:
            found, remedy = ", ".join(self.parts) or "none", "Nothing opens a folder without it."
            raise InputError("parts", found, f"{PARTS[0]} among them", remedy)

    def form(self, part: str) -> Format | None:
        """What the layers of a part become; None keeps them as they are."""
        names = {"backbone": self.backbone, "decoder": self.decoder, "image_tokenizer": self.vision}
        return FORMS[names.get(part.removesuffix("-turbo"), "keep")]

    def wants(self, part: str) -> bool:
        """Whether the new folder is to have a part."""
        return self.parts is None or part in self.parts

    def as_dict(self) -> dict[str, object]:
        """The choices as JSON holds them."""
        return asdict(self) | {"parts": None if self.parts is None else sorted(self.parts)}
