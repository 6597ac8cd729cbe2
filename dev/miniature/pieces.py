"""Carry a run from one machine to another: what its stages have learnt, in bfloat16, cut into files of a size.

    python -m dev.miniature.pieces pack RUN FOLDER [--size 15000000]
    python -m dev.miniature.pieces unpack FOLDER RUN

The optimizers stay behind, and so do the pools of pictures: a stage that goes on (`train --more`) makes both anew, and
its learning rate rises once more.
"""

import argparse
import io
import tarfile
from pathlib import Path

import torch

_NAMES = ("*.pt", "latents.json")


def pack(run: Path, folder: Path, size: int = 15_000_000) -> list[Path]:
    """Write the pieces of a run to a folder; returns them in order."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for path in sorted(path for name in _NAMES for path in run.glob(name) if not path.name.startswith("pool-")):
            data = path.read_bytes() if path.suffix != ".pt" else _slim(path)
            entry = tarfile.TarInfo(path.name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, at in enumerate(range(0, whole.tell(), size)):
        written.append(folder / f"run.{number:02d}")
        written[-1].write_bytes(whole.getvalue()[at : at + size])
    return written


def _slim(path: Path) -> bytes:
    state = torch.load(path, map_location="cpu", weights_only=True)
    # The routers' biases move by thousandths, and a step counter by one.
    model = {
        name: value.bfloat16() if value.is_floating_point() and value.ndim > 1 else value
        for name, value in state["model"].items()
    }
    out = io.BytesIO()
    torch.save({**state, "model": model, "optimizer": None}, out)
    return out.getvalue()


def unpack(folder: Path, run: Path) -> list[str]:
    """Make a run of pieces; returns the names of its files.

    Raises:
        ValueError: a name that is none of a run's.
    """
    run.mkdir(parents=True, exist_ok=True)
    whole = io.BytesIO(b"".join(path.read_bytes() for path in sorted(folder.glob("run.*"))))
    names = []
    with tarfile.open(fileobj=whole) as archive:
        for entry in archive.getmembers():
            if Path(entry.name).name != entry.name or not any(Path(entry.name).match(name) for name in _NAMES):
                raise ValueError(f"{entry.name!r} is no file of a run")
            (run / entry.name).write_bytes(archive.extractfile(entry).read())
            names.append(entry.name)
    return names


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--size", type=int, default=15_000_000, help="bytes of a piece at most")
    options = parser.parse_args()
    if options.what == "pack":
        print(*pack(options.source, options.target, options.size), sep="\n")
    else:
        print(*unpack(options.source, options.target), sep="\n")
