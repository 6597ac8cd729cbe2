"""A real ComfyUI's own modules in this process, without its server, and the pack among them as the host loads it."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .launch import Silence, import_torchvision

ROOT = Path(__file__).resolve().parents[2]
PACK = "pack_under_test"  # the host loads a pack under a name of its own, whatever its folder is called


def enter(comfyui: str, options: list[str]) -> Any:
    """Make a ComfyUI's modules this process's. Nothing of ours that is named like one of them may be loaded yet.

    Args:
        comfyui: its folder.
        options: for its own command line, such as "--cpu".

    Returns:
        What must be kept while they are used (`launch.import_torchvision`).
    """
    declared = import_torchvision() if "--cpu" in options else None
    if importlib.util.find_spec("torchaudio") is None:
        sys.meta_path.append(Silence())
    sys.argv = ["main.py", *options]
    sys.path.insert(0, comfyui)
    importlib.import_module("comfy.options").enable_args_parsing()
    importlib.import_module("utils.extra_config")  # first, as in main.py: another library brings a `utils` too
    importlib.import_module("nodes")
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[PACK] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[PACK])
    return declared


def pack(name: str) -> ModuleType:
    """A module of the pack: "llada_core.engine"."""
    return importlib.import_module(f"{PACK}.{name}")
