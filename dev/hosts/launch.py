"""Runs a Python program where torchvision may have been built for another torch.

ComfyUI imports torchvision, whose Python half asks for two operators that only its compiled half declares. On a CPU
machine without that half the declarations are enough: no test of ours resizes through them. Newer ones import
torchaudio too; where there is none an empty module stands in, as no node of ours hears anything. Without `--cpu`
nothing is done: ComfyUI chooses torch's allocator, so torch must not have been imported before it.

Usage: python launch.py <program> [arguments]
"""

import importlib.util
import runpy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


def declare_operators() -> Any:
    """Declare torchvision's nms and qnms; they last as long as what is returned."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def import_torchvision() -> Any:
    """Import it, with the operators declared where that fails; what is returned must be kept."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        return declare_operators()


def stand_in_for_torchaudio() -> None:
    """Put an empty torchaudio where none is installed."""
    if importlib.util.find_spec("torchaudio") is None:
        for name in ("torchaudio", "torchaudio.functional", "torchaudio.transforms"):
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__spec__ = ModuleSpec(name, None)  # transformers asks for it
            parent, _, leaf = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], leaf, sys.modules[name])


if __name__ == "__main__":
    if "--cpu" in sys.argv:
        stand_in_for_torchaudio()
    declared = import_torchvision() if "--cpu" in sys.argv else None
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
