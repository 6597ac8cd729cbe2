"""For scripts that run inside a real ComfyUI's own modules: the pack, loaded as the host loads it."""

import importlib
import importlib.util
import sys
from pathlib import Path

PACK, ROOT = "pack_under_test", Path(__file__).resolve().parents[2]


def enter(comfyui: str, options: list[str]) -> None:
    """Make a ComfyUI folder the place that `comfy` is imported from, started with these options."""
    sys.argv = ["main.py", *options]
    sys.path.insert(0, comfyui)
    import comfy.options

    comfy.options.enable_args_parsing()
    importlib.import_module("utils.extra_config")  # first, as in main.py: another library brings a `utils` too


def load_pack() -> None:
    """Import the pack under a name of its own, whatever its folder is called."""
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[PACK] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[PACK])


def of_pack(name: str):
    """A module of the pack, by its name inside it."""
    return importlib.import_module(f"{PACK}.{name}")
