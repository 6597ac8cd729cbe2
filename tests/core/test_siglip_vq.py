"""vision/siglip_vq.py: codes against the reference's, the codebook search, and files that do not fit.

`checkpoint/component.py` is tested here too, on the smallest real component.
"""

import copy
import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from llada_core.errors import CheckpointError, InputError
from llada_core.vision import siglip_vq
from llada_core.vision.preprocess import Normalisation, prepare, to_picture, to_pixels
from llada_core.vision.siglip_vq import build, nearest_codes, open_siglip_vq

WEIGHTS = "image_tokenizer.safetensors"
RELEASED = {
    "vision_config": {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_heads": 16,
        "depth": 40,
        "patch_size": 16,
        "image_size": 2048,
        "in_channels": 3,
        "hidden_act": "gelu",
        "attention_bias": True,
        "layer_norm_eps": 1e-6,
        "spatial_merge_size": 1,
    },
    "vq_config": {"num_embeddings": 16384, "embed_dim": 2048, "latent_channels": 1536, "in_channels": 3},
}


@pytest.fixture(scope="module")
def component(golden_checkpoint):
    return open_siglip_vq(golden_checkpoint / "image_tokenizer")


@pytest.fixture(scope="module")
def model(component):
    return component.load(torch.float32)


@pytest.fixture(scope="module")
def images(golden, golden_images, golden_checkpoint) -> list:
    """(name, normalised pixels, expected codes) of every golden image."""
    config = json.loads((golden_checkpoint / "image_tokenizer" / "preprocessor_config.json").read_text())
    normalise = Normalisation.from_config(config)
    cases = []
    for case in golden["image_tokens"]:
        image = torch.from_numpy(np.array(Image.open(golden_images / case["file"]))).float() / 255
        pixels = to_pixels(to_picture(image)) if case["how"] == "as_is" else prepare(image, case["how"], "crop")
        codes = torch.tensor(case["token_ids"]).view(case["h"], case["w"])
        cases.append((case["file"], normalise(pixels), codes))
    return cases


# Against the reference


def test_codes_are_those_of_the_reference(model, images):
    assert len(images) == 7
    for name, pixels, expected in images:
        codes = model.encode(pixels)
        assert codes.dtype == torch.int64
        assert codes.device.type == "cpu"
        assert torch.equal(codes, expected), name


def test_our_way_through_the_tower_is_the_librarys(model):
    patches = torch.randn(5 * 7, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model._features(patches, 5, 7)
        theirs = model.visual(patches.flatten(1), torch.tensor([[1, 5, 7]])).last_hidden_state
        latents = theirs.view(1, 5, 7, -1).permute(0, 3, 1, 2)
        codes = model.vqmodel.encode(latents).image_tokens
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    pixels = patches.view(5, 7, 3, 16, 16).permute(2, 0, 3, 1, 4).reshape(3, 80, 112)
    assert torch.equal(model.encode(pixels), codes.view(5, 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_same_codes(component, images, dtype):
    model = component.load(dtype)
    same = torch.cat([(model.encode(pixels) == codes).flatten() for _, pixels, codes in images])
    assert same.float().mean() > 0.9


def test_weights_may_be_of_another_type_than_the_computation(component, model, images):
    """What the library reads from weights by itself may be stored otherwise: a host casts only what layers read."""
    stored = component.load(torch.float32)
    stored.visual.embeddings.to(torch.float64)
    stored.vqmodel.quantize.to(torch.float64)
    _, pixels, codes = images[0]
    assert torch.equal(stored.encode(pixels, torch.device("cpu"), torch.float32), codes)
    assert stored.visual.embeddings.position_embedding.weight.dtype == torch.float64


def test_attention_is_fused(model):
    assert model.visual.config._attn_implementation == "sdpa"


# The codebook search


@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 12), st.integers(1, 60), st.integers(0, 2**32))
def test_the_nearest_code_is_the_one_at_the_smallest_distance(codes, latents, width, sliced, seed):
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randn(codes, width, generator=generator)
    z = torch.randn(latents, width, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(siglip_vq, "CODE_SLICE", sliced)
        found = nearest_codes(z, codebook)
    distances = torch.cdist(F.normalize(z.double(), dim=-1), F.normalize(codebook.double(), dim=-1))
    chosen = distances.gather(1, found[:, None])[:, 0]
    assert torch.allclose(chosen, distances.amin(1), atol=1e-3)


@pytest.mark.parametrize("sliced", [1, 2, 3, 100])
def test_of_equal_codes_the_lowest_is_taken(monkeypatch, sliced):
    monkeypatch.setattr(siglip_vq, "CODE_SLICE", sliced)
    codebook = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    assert nearest_codes(torch.tensor([[2.0, 0.0], [0.0, 0.5]]), codebook).tolist() == [1, 0]


def test_half_precision_latents_are_compared_in_float32():
    # Codes that bfloat16 cannot tell apart by their distance.
    codebook = torch.tensor([[1.0, 0.02], [1.0, 0.0]])
    assert nearest_codes(torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16), codebook).tolist() == [1]
    generator = torch.Generator().manual_seed(0)
    z, codebook = torch.randn(300, 8, generator=generator).bfloat16(), torch.randn(3000, 8, generator=generator)
    assert torch.equal(nearest_codes(z, codebook), nearest_codes(z.float(), codebook))


# What is refused


@pytest.mark.parametrize("shape", [(3, 16), (1, 16, 16), (4, 16, 16), (3, 24, 16), (3, 16, 20), (3, 0, 16), (3, 16, 0)])
def test_pixels_that_are_refused(model, shape):
    with pytest.raises(InputError, match="pixels: found"):
        model.encode(torch.zeros(shape))


def test_numbers_out_of_range_are_not_taken_for_codes(model):
    pixels = torch.zeros(3, 32, 32)
    pixels[0, 0, 0] = float("inf")
    with pytest.raises(InputError, match=r"precision: found features beyond the range of torch\.float32"):
        model.encode(pixels)


def test_a_weight_that_is_no_number_is_named(component):
    broken = component.load(torch.float32)
    broken.visual.blocks[1].mlp.fc1.bias.data[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"image_tokenizer: visual\.blocks\.1\.mlp\.fc1\.bias: found 1 numbers"):
        broken.encode(torch.zeros(3, 32, 32))


def changed(config: dict, part: str, **fields) -> dict:
    config = copy.deepcopy(config)
    config[part] |= fields
    return config


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"vision_config": RELEASED["vision_config"]},
        RELEASED | {"vq_config": [1]},
        changed(RELEASED, "vision_config", depth=0),
        changed(RELEASED, "vision_config", depth=None),
        changed(RELEASED, "vision_config", num_heads="16"),
        changed(RELEASED, "vision_config", num_heads=7),
        changed(RELEASED, "vision_config", patch_size=14),
        changed(RELEASED, "vision_config", hidden_size=1024),
        changed(RELEASED, "vision_config", hidden_act="no such function"),
        changed(RELEASED, "vq_config", latent_channels=1024),
        changed(RELEASED, "vq_config", num_embeddings=True),
    ],
)
def test_configurations_that_are_refused(config):
    with pytest.raises(CheckpointError, match=r"image_tokenizer: config\.json"):
        build(config)


def test_unknown_fields_are_named_in_one_line(caplog):
    caplog.set_level(logging.INFO)
    config = changed(RELEASED, "vision_config", depth=1, colour="blue", _note="x")
    assert build(config).visual.config.depth == 1
    lines = [record.getMessage() for record in caplog.records if "colour" in record.getMessage()]
    assert len(lines) == 1
    assert "_note" not in lines[0]


@pytest.fixture
def folder(checkpoint_copy):
    return checkpoint_copy / "image_tokenizer"


def rewrite(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_missing_files_are_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"image_tokenizer: {name}: found no such file"):
        open_siglip_vq(folder)


def test_a_truncated_file_is_refused(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}.*unreadable"):
        open_siglip_vq(folder)


def test_an_absent_tensor_is_refused(folder):
    rewrite(folder, lambda t: t.pop("model.visual.blocks.1.mlp.fc1.bias"))
    with pytest.raises(CheckpointError, match=r"visual\.blocks\.1\.mlp\.fc1\.bias"):
        open_siglip_vq(folder)


def test_a_tensor_of_another_shape_is_refused(folder):
    rewrite(folder, lambda t: t.update({"model.vqmodel.quantize.embedding.weight": torch.zeros(255, 24)}))
    with pytest.raises(CheckpointError, match=r"quantize\.embedding\.weight of shape \[255, 24\]"):
        open_siglip_vq(folder)


def test_an_unknown_tensor_is_refused(folder):
    rewrite(folder, lambda t: t.update({"model.language_model.norm.weight": torch.zeros(4)}))
    with pytest.raises(CheckpointError, match=r"the unknown tensor model\.language_model"):
        open_siglip_vq(folder)


# Component


def test_the_released_tower_takes_the_memory_that_the_documents_say():
    module = build(RELEASED)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert not module.training
    assert module.codebook_size == 16384
    assert sum(p.numel() for p in module.parameters()) * 2 == pytest.approx(2.4e9, rel=0.05)


def test_a_component_knows_its_size(component, golden_checkpoint):
    tensors = load_file(golden_checkpoint / "image_tokenizer" / WEIGHTS)
    numbers = sum(t.numel() for t in tensors.values())
    assert component.bytes(torch.float32) == 4 * numbers
    assert component.bytes(torch.bfloat16) == 2 * numbers
    kept = dataclasses.replace(component, keep_float32=lambda name: name.startswith("vqmodel."))
    quantizer = sum(t.numel() for key, t in tensors.items() if "vqmodel" in key)
    assert kept.bytes(torch.bfloat16) == 2 * numbers + 2 * quantizer
    loaded = kept.load(torch.bfloat16)
    assert sum(t.nbytes for t in loaded.state_dict().values()) == kept.bytes(torch.bfloat16)
    assert loaded.vqmodel.quantize.embedding.weight.dtype == torch.float32


def test_a_component_can_be_loaded_again_and_holds_no_weights(component):
    first, second = component.load(torch.float32), component.load(torch.bfloat16)
    assert {p.device.type for p in component.module.parameters()} == {"meta"}
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    assert {p.dtype for p in second.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in first.parameters())
    assert not first.training
