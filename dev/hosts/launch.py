"""Runs a Python program where torchvision may have been built for another torch, and torchaudio may be missing.

ComfyUI imports torchvision, whose Python half asks for two operators that only its compiled half declares. On a CPU
machine without that half the declarations are enough: no test of ours resizes through them. Without `--cpu` nothing is
done: ComfyUI chooses torch's allocator, so torch must not have been imported before it.

From 0.33 on ComfyUI does not start without torchaudio, which is built for one torch and one only. Where it is missing,
modules that hold nothing take its place: no test of ours makes a sound.

Usage: python launch.py <program> [arguments]
"""

import importlib.util
import runpy
import sys
from importlib.abc import Loader, MetaPathFinder
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


class Silence(MetaPathFinder, Loader):
    """Finds torchaudio and all below it: modules whose every name is a class that nobody can make an object of."""

    def find_spec(self, fullname, path=None, target=None):
        """The module's spec, or None for all others."""
        return ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] == "torchaudio" else None

    def create_module(self, spec) -> ModuleType:
        """A module that makes up its names as they are asked for."""
        module = ModuleType(spec.name)

        def absent(_self, *_arguments, **_named):
            raise RuntimeError("torchaudio is a stand-in here; install it to work with sound")

        def named(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {"__init__": absent, "__module__": spec.name})

        module.__getattr__ = named
        return module

    def exec_module(self, module) -> None:
        """Nothing is in it."""


if __name__ == "__main__":
    declared = import_torchvision() if "--cpu" in sys.argv else None
    if importlib.util.find_spec("torchaudio") is None:
        sys.meta_path.append(Silence())
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
