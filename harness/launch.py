"""Runs a Python program where torchvision may have been built for another torch.

ComfyUI imports torchvision, whose Python half asks for two operators that only its compiled half declares. On a CPU
machine without that half the declarations are enough: no test of ours resizes through them.

Usage: python launch.py <program> [arguments]
"""

import runpy
import sys
from pathlib import Path

import torch


def declare_operators() -> torch.library.Library:
    """Declare torchvision's nms and qnms; they last as long as what is returned."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


if __name__ == "__main__":
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        declared = declare_operators()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
