"""What the registry's checkers and the house ask of the source: who imports what, characters, calls, length."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / name for name in ("benchmarks", "dev", "llada_core", "nodes", "scripts", "tests")]
FILES = [ROOT / "__init__.py", *(path for folder in FOLDERS for path in folder.rglob("*.py"))]
PRODUCT = [path for path in FILES if path.relative_to(ROOT).parts[0] in ("nodes", "llada_core", "__init__.py")]

HOST = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "nodes", "server", "execution", "latent_preview"}
OURS = ("nodes", "llada_core", "dev", "benchmarks", "tests")
ENGINE_FOR_NODES = {
    "engine",
    "image_tokens",
    "options",
    "progress",
    "errors",
    "checks",
    "zimage",
    "preview_colours",
    "token_edits",
}
LAYERS = {  # of the engine: what a package may import besides itself and the modules that belong to none
    "quantization": set(),
    "checkpoint": {"quantization"},
    "backbone": {"checkpoint", "quantization"},
    "vision": {"checkpoint", "quantization"},
    "decoder": {"checkpoint", "quantization"},
    "sampling": {"backbone", "checkpoint", "quantization"},
    "conversion": {"backbone", "checkpoint", "decoder", "quantization", "vision"},
}
ON_TOP = ("doctor", "batch")  # programs over the engine
LAYERS |= {package: set(LAYERS) for package in ON_TOP}
NOT_FOR_A_PACK = {
    r"\.cuda\s*\(": ".cuda(): the host says which device",
    r"\.to\(\s*[\"']cuda": '.to("cuda"): the host says which device',
    r"torch\.(?:cuda\.amp\.|amp\.)?autocast": "autocast: the host says which type",
    r"torch\.cuda\.empty_cache\s*\(": "empty_cache(): the host manages memory",
    r"torch\.manual_seed\s*\(|torch\.random\.": "the global generator is not ours",
}
# Memory cannot be taken from torch's other pools inside a capture, so it must be free before one.
EMPTIES_THE_CACHE = "llada_core/backbone/cuda_graphs.py"


def imports(path: Path) -> set[str]:
    """Every module that a file of ours imports, by its full dotted name from the repository's root."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_characters_are_those_of_every_windows():
    """A Windows with the western code page reads a file by it; the registry's checker refuses any other character."""
    for path in FILES:
        found = {c for c in path.read_text(encoding="utf-8") if not c.encode("cp1252", "ignore")}
        assert not found, f"{name(path)}: {found!a}"


def test_files_stay_short():
    assert [name(path) for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > 400] == []


@pytest.mark.parametrize("pattern", NOT_FOR_A_PACK)
def test_what_a_pack_must_not_call(pattern):
    for path in PRODUCT:
        if "empty_cache" in pattern and name(path) == EMPTIES_THE_CACHE:
            continue
        code = re.sub(r"#.*", "", path.read_text(encoding="utf-8"))
        code = re.sub(r'""".*?"""', "", code, flags=re.DOTALL)
        assert not re.search(pattern, code), f"{name(path)}: {NOT_FOR_A_PACK[pattern]}"


def test_only_the_nodes_host_folder_knows_the_host():
    for path in PRODUCT:
        used = {module.split(".")[0] for module in imports(path)} & HOST - {"nodes"}
        if path.is_relative_to(ROOT / "nodes" / "host"):
            continue
        allowed = {"comfy_api"} if not path.is_relative_to(ROOT / "llada_core") else set()
        assert used <= allowed, name(path)


def test_imports_inside_the_pack_are_relative():
    """The host loads the pack under a name of its own, beside a module of its own named `nodes`."""
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] not in OURS, name(path)


def test_nodes_reach_the_engine_through_its_front():
    for path in (ROOT / "nodes").rglob("*.py"):
        used = {module.split(".")[1] for module in imports(path) if module.startswith("llada_core.")}
        assert used <= ENGINE_FOR_NODES, name(path)


def test_the_engine_has_layers_and_no_circles():
    for path in (ROOT / "llada_core").rglob("*.py"):
        package = path.relative_to(ROOT / "llada_core").parts[0]
        used = {module.split(".")[1] for module in imports(path) if module.startswith("llada_core.")}
        if package in LAYERS and path.name != "__main__.py":  # that is a program, wherever it lies
            assert used & set(LAYERS) <= LAYERS[package] | {package}, name(path)
            assert "engine" not in used or package in ON_TOP, name(path)
        assert not any(module.startswith("nodes.") for module in imports(path)), name(path)


def test_no_folder_of_source_is_forgotten():
    found = {path.parent for path in ROOT.glob("*/*.py")} | {path.parents[1] for path in ROOT.glob("*/*/*.py")}
    assert {path for path in found if path.name[0] != "."} == set(FOLDERS)


def test_every_package_of_the_engine_has_its_layer():
    packages = {path.name for path in (ROOT / "llada_core").iterdir() if (path / "__init__.py").is_file()}
    assert packages <= set(LAYERS)
