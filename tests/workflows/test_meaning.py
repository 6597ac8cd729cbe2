"""The shipped workflows, end to end, on the miniature: what comes out is what was asked for."""

import numpy as np
from PIL import Image

from dev.hosts.results import Shown, of_process, of_server
from dev.hosts.scenes import SAID, SHOWN, for_miniature
from dev.miniature.checker import look


def check(name: str, shown: Shown) -> None:
    """Compare saved pictures, by their pixels, and texts with what the workflow was asked."""
    pictures, texts = shown
    assert len(pictures) == len(SHOWN[name])
    for path, scene in zip(pictures, SHOWN[name], strict=True):
        picture = np.asarray(Image.open(path))
        rows, columns = scene.grid
        assert picture.shape == (32 * rows, 32 * columns, 3)
        found = look(picture)
        assert (found.things, found.background) == (scene.things, scene.background)
    assert texts == ([SAID[name]] if name in SAID else [])


def test_in_this_process(name, miniature_runs):
    graph, done = miniature_runs(name)
    check(name, of_process(graph, done))


def test_in_a_real_comfyui(name, api, comfy_server):
    graph = for_miniature(name, api)
    check(name, of_server(graph, comfy_server.run(graph), comfy_server))
