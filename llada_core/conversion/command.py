"""The command `python -m llada_core.quantization SOURCE TARGET`."""

import argparse
import sys
import time
from pathlib import Path

import torch

from ..bar import Bar
from ..errors import InputError
from ..whole_file import PARTIAL
from .convert import convert
from .options import BACKBONE_FORMS, PARTS, PIXEL_FORMS, Conversion

_ABOUT = """Write a checkpoint folder in fewer bits from the bf16 or FP8 release.

The new folder has the released layout and is opened like it. Weights are read, quantized and written a bank of experts
at a time, in about 2 GB of memory. What is not finished lies in TARGET.partial: run the same command again and it goes
on there. Files that stay as they are become hard links where the file system lets them."""


def main(arguments: list[str] | None = None) -> int:
    """Parse, convert, and say what was done; returns the exit status."""
    choices = _parser().parse_args(arguments)
    began = time.monotonic()
    bar = Bar()
    try:
        conversion = Conversion(choices.backbone, choices.decoder, choices.vision, choices.parts)
        record = convert(choices.source, choices.target, conversion, choices.device, not choices.copy, bar)
    except InputError as error:
        bar.end()
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        bar.end()
        print(f"Stopped. The same command goes on in {choices.target.name}{PARTIAL}.", file=sys.stderr)
        return 130
    bar.end()
    size = sum(path.stat().st_size for path in choices.target.rglob("*") if path.is_file())
    linked = [path for path, how in record.kept.items() if how == "linked"]
    print(
        f"{choices.target}: {size / 1e9:.3g} GB in {time.monotonic() - began:.0f} s. README.md there has the details."
    )
    if linked:
        print(f"Hard links to the source's own files, which take no space of their own: {', '.join(linked)}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llada_core.quantization",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the released folder; it is never changed")
    parser.add_argument("target", type=Path, metavar="TARGET", help="the folder to write; it must not be there yet")
    parser.add_argument(
        "--backbone",
        choices=BACKBONE_FORMS,
        default="int4",
        help="the language model's layers (default: int4; int4-128 is smaller and faster, its error a third larger)",
    )
    parser.add_argument("--decoder", choices=PIXEL_FORMS, default="int8", help="both decoders' (default: int8)")
    parser.add_argument("--vision", choices=PIXEL_FORMS, default="keep", help="SigLIP-VQ's (default: keep)")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, metavar="PART", help=f"only these of {', '.join(PARTS)} (default: all)"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="where weights are quantized (default here: %(default)s)")
    parser.add_argument("--copy", action="store_true", help="copy files that stay as they are instead of linking them")
    return parser
