"""What the decoder's own workflows promise beyond a right picture: the miniature in a ComfyUI that knows Z-Image."""

import copy
import json

import numpy as np
import pytest
from PIL import Image

from dev.hosts.base_folder import GRAPHS
from dev.hosts.results import of_server
from dev.hosts.scenes import FIRST, MASK, PROMPTS, for_miniature
from dev.miniature.world import render

NOTHING = 1  # level of 255: what rounding to 8 bits may make of float32


@pytest.fixture(scope="module")
def drawn(zimage_server):
    """(name, changes of the graph) -> the saved pictures of a workflow, int16 [height, width, 3]."""

    def run(name: str, change=lambda graph: None) -> list[np.ndarray]:
        graph = for_miniature(name, json.loads((GRAPHS / f"{name}.json").read_text()))
        change(graph)
        files, _ = of_server(graph, zimage_server.run(graph), zimage_server)
        return [np.asarray(Image.open(file)).astype(np.int16) for file in files]

    return run


def nodes(graph: dict, kind: str) -> list[dict]:
    """The nodes of a class."""
    return [node for node in graph.values() if node["class_type"] == kind]


def test_stock_samplers_draw_what_decode_draws(drawn):
    """KSampler with turbo, SamplerCustom with the normal decoder, against Decode on the same tokens and seed."""
    for ours, theirs in zip(drawn("turbo-and-normal"), drawn("decoder-with-ksampler"), strict=True):
        assert np.abs(ours - theirs).max() <= NOTHING


def test_another_seed_draws_something_else(drawn):
    def reseeded(graph: dict) -> None:
        for node in nodes(graph, "KSampler"):
            node["inputs"]["seed"] = 1

    first, second = drawn("decoder-with-ksampler"), drawn("decoder-with-ksampler", reseeded)
    assert np.abs(first[0] - second[0]).max() > NOTHING
    assert np.array_equal(first[1], second[1])


def test_outside_the_mask_every_pixel_is_the_photos(drawn):
    (result,) = drawn("edit-in-a-mask")
    photo = np.asarray(render(FIRST)).astype(np.int16)
    inside = np.zeros(photo.shape[:2], dtype=bool)
    left, top, right, bottom = MASK
    inside[top:bottom, left:right] = True
    assert np.array_equal(result[~inside], photo[~inside])
    assert np.abs(result[inside] - photo[inside]).max() > 100


def test_nothing_painted_is_nothing_changed(drawn):
    def unpainted(graph: dict) -> None:
        (node,) = nodes(graph, "LoadImage")
        node["inputs"]["image"] = "example.png"

    (result,) = drawn("edit-in-a-mask", unpainted)
    assert np.array_equal(result, np.asarray(render(FIRST)))


def test_an_edit_that_starts_from_the_photo_goes_as_far_as_denoise_says(drawn):
    """Where the edit changes nothing it is the photo but for the VAE; where it does, less denoise changes less."""
    photo = np.asarray(render(FIRST)).astype(np.int16)

    def going(denoise: float):
        def change(graph: dict) -> None:
            (node,) = nodes(graph, "KSampler")
            node["inputs"] |= {"denoise": denoise, "steps": max(2, round(49 * denoise))}

        return change

    (whole,) = drawn("edit-keeps-the-photo")
    (little,) = drawn("edit-keeps-the-photo", going(0.02))
    changed = np.abs(whole - photo).max(-1) > 60
    assert 0.02 < changed.mean() < 0.2
    assert np.abs(whole - photo)[~changed].mean() < 2
    assert np.abs(little - photo)[changed].mean() < 0.8 * np.abs(whole - photo)[changed].mean()


def test_a_lora_changes_the_picture_by_its_strength(drawn):
    def strong(strength: float):
        def change(graph: dict) -> None:
            (node,) = nodes(graph, "LoraLoaderModelOnly")
            node["inputs"]["strength_model"] = strength

        return change

    def without(graph: dict) -> None:
        (lora,) = [key for key, node in graph.items() if node["class_type"] == "LoraLoaderModelOnly"]
        (sampler,) = nodes(graph, "KSampler")
        sampler["inputs"]["model"] = copy.copy(graph.pop(lora)["inputs"]["model"])

    (plain,) = drawn("with-lora", without)
    (none,) = drawn("with-lora", strong(0.0))
    (some,) = drawn("with-lora")
    (more,) = drawn("with-lora", strong(4.0))
    assert np.array_equal(plain, none)
    assert 0 < np.abs(some - plain).mean() < np.abs(more - plain).mean()


def test_the_larger_picture_lies_where_the_first_did(drawn):
    """Twice the size, and every place beside its own tokens: reduced it is the picture of the trained size."""

    def same_scene(graph: dict) -> None:
        for node in nodes(graph, "LLaDAUniSample"):
            node["inputs"]["prompt"] = PROMPTS["larger"]

    (large,) = drawn("larger")
    (small, _) = drawn("decoder-with-ksampler", same_scene)
    assert large.shape == (2 * small.shape[0], 2 * small.shape[1], 3)
    reduced = large.reshape(small.shape[0], 2, small.shape[1], 2, 3).mean((1, 3))
    assert np.abs(reduced - small).mean() < 2
