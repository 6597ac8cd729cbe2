"""Decoders in the form of Z-Image's own release: names, fusing, quantized layers, and what the engine makes of them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llada_core.decoder.zimage_form import (
    check_zimage_form,
    is_zimage_form,
    quantize_layers,
    to_zimage_form,
    zimage_name,
)
from llada_core.engine import LLaDAUni
from llada_core.errors import CheckpointError, InputError
from llada_core.image_tokens import ImageTokens
from llada_core.options import Decoding
from llada_core.quantization.formats import FP8Block, Int8, encode_metadata
from llada_core.zimage import decoder_files, features_of

QUERY = "layers.0.attention.to_q.weight"
FUSED = "layers.0.attention.qkv.weight"


@pytest.fixture(scope="module")
def tensors(golden_checkpoint) -> dict[str, torch.Tensor]:
    return load_file(golden_checkpoint / "decoder" / "decoder_model.safetensors")


def quantized(tensors: dict[str, torch.Tensor], form) -> dict[str, torch.Tensor]:
    """The same with the matrices of attention stored in a form."""
    found = {}
    for key, tensor in tensors.items():
        if ".attention.to_" not in key:
            found[key] = tensor
            continue
        layer = key.removesuffix(".weight")
        found |= {f"{layer}.{suffix}": stored for suffix, stored in form.quantize(tensor).items()}
        said = form.metadata(tuple(tensor.shape))
        if said is not None:
            found[f"{layer}.comfy_quant"] = encode_metadata(said)
    return found


def test_names_are_those_of_the_release(tensors):
    form = to_zimage_form(tensors, "decoder")
    expected = {
        "x_embedder.weight",
        "cap_embedder.0.weight",
        "cap_embedder.1.bias",
        "t_embedder.mlp.2.weight",
        "context_refiner.0.attention.out.weight",
        "noise_refiner.0.attention.q_norm.weight",
        "layers.1.attention.k_norm.weight",
        "layers.1.adaLN_modulation.0.bias",
        "layers.1.feed_forward.w3.weight",
        "final_layer.adaLN_modulation.1.weight",
        "x_pad_token",
        "cap_pad_token",
        FUSED,
    }
    assert expected < set(form)
    assert len(form) == len(tensors) - 2 * sum(".to_q." in key for key in tensors)
    assert is_zimage_form(form)
    assert not is_zimage_form(tensors)


def test_queries_keys_and_values_lie_below_one_another_and_the_rest_is_not_copied(tensors):
    form = to_zimage_form(tensors, "decoder")
    parts = [tensors[QUERY.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
    assert torch.equal(form[FUSED], torch.cat(parts))
    assert form["layers.0.feed_forward.w1.weight"] is tensors["layers.0.feed_forward.w1.weight"]


def test_a_file_in_that_form_stays_as_it_is_less_the_prefix(tensors):
    form = to_zimage_form(tensors, "decoder")
    again = to_zimage_form({f"model.diffusion_model.{key}": tensor for key, tensor in form.items()}, "decoder")
    assert set(again) == set(form)
    assert all(again[key] is form[key] for key in form)


def test_int8_rows_are_fused_with_their_scales(tensors):
    form = to_zimage_form(quantized(tensors, Int8()), "decoder")
    layer = FUSED.removesuffix(".weight")
    stored = {suffix: form[f"{layer}.{suffix}"] for suffix in ("weight", "weight_scale")}
    dense = to_zimage_form(tensors, "decoder")[FUSED]
    assert json.loads(bytes(form[f"{layer}.comfy_quant"].tolist())) == {"format": "int8_tensorwise"}
    assert stored["weight"].dtype == torch.int8
    back = Int8().dequantize(stored, dense.shape[1], torch.float32)
    assert (back - dense).abs().max() <= stored["weight_scale"].max() / 2 + 1e-6


def test_one_int8_scale_a_matrix_becomes_one_a_row(tensors):
    given = quantized(tensors, Int8())
    scales = {"to_q": 0.5, "to_k": 0.25, "to_v": 2.0}
    for part, scale in scales.items():
        given[f"layers.0.attention.{part}.weight_scale"] = torch.tensor(scale)
    form = to_zimage_form(given, "decoder")
    rows = len(tensors[QUERY])
    expected = torch.tensor([s for s in scales.values() for _ in range(rows)])[:, None]
    assert torch.equal(form["layers.0.attention.qkv.weight_scale"], expected)


def test_blocks_of_fp8_become_dense(tensors):
    form = to_zimage_form(quantized(tensors, FP8Block()), "decoder")
    assert not any("scale" in key for key in form)
    assert form[FUSED].dtype == torch.bfloat16
    dense = to_zimage_form(tensors, "decoder")[FUSED]
    assert (form[FUSED].float() - dense).norm() < 0.05 * dense.norm()


def test_dense_layers_are_quantized_row_by_row_and_the_rest_stays(tensors):
    form = to_zimage_form(tensors, "decoder")
    given = quantize_layers(form, Int8())
    again = to_zimage_form(quantized(tensors, Int8()), "decoder")
    for suffix in ("weight", "weight_scale", "comfy_quant"):
        assert torch.equal(given[f"layers.0.attention.qkv.{suffix}"], again[f"layers.0.attention.qkv.{suffix}"])
    made = {key.rpartition(".")[0] for key in given if key.endswith("comfy_quant")}
    assert made == {
        f"{block}.{layer}"
        for block in ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0")
        for layer in ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    }
    kept = [key for key in form if key.removesuffix(".weight") not in made]
    assert all(given[key] is form[key] for key in kept)
    twice = quantize_layers(given, Int8())
    assert set(twice) == set(given)
    assert all(twice[key] is given[key] for key in given)


def test_parts_that_one_matrix_cannot_hold_are_refused(tensors):
    given = quantized(tensors, Int8())
    layer = QUERY.removesuffix(".weight")
    for part in ("to_q", "to_k", "to_v"):
        name = layer.replace("to_q", part)
        given[f"{name}.comfy_quant"] = encode_metadata({"format": "float8_e4m3fn"})
        given[f"{name}.weight_scale"] = torch.tensor({"to_q": 1.0, "to_k": 2.0, "to_v": 3.0}[part])
    with pytest.raises(CheckpointError, match=r"weight_scale.*one matrix"):
        to_zimage_form(given, "decoder")
    del given[f"{layer.replace('to_q', 'to_k')}.weight_scale"]
    with pytest.raises(CheckpointError, match=r"no layers\.0\.attention\.to_k\.weight_scale"):
        to_zimage_form(given, "decoder")
    with pytest.raises(CheckpointError, match="no x_pad_token"):
        to_zimage_form({"a": torch.zeros(1)}, "decoder")


def test_a_file_that_lacks_a_tensor_is_refused(tensors):
    keys = set(to_zimage_form(tensors, "decoder"))
    names = [key.replace("semantic_embedder.", "cap_embedder.") for key in tensors]
    check_zimage_form(keys, names, "decoder")
    with pytest.raises(CheckpointError, match=r"no final_layer\.linear\.bias \(1 tensors absent\)"):
        check_zimage_form(keys - {"final_layer.linear.bias"}, names, "decoder")
    assert {zimage_name(name) for name in names} == keys


def test_the_engine_opens_a_checkpoint_whose_decoder_is_in_that_form(checkpoint_copy, tensors):
    path = checkpoint_copy / "decoder" / "decoder_model.safetensors"
    save_file(to_zimage_form(tensors, "decoder"), path)
    model = LLaDAUni(checkpoint_copy)
    assert decoder_files(model, "normal").weights == path
    tokens = ImageTokens((torch.zeros(2, 2, dtype=torch.int64),), model.codebook_size)
    with pytest.raises(InputError, match="Load Decoder"):
        model.decode(tokens, Decoding(turbo=False))
    assert model.decode(tokens, Decoding(turbo=True, steps=1))[0].shape == (64, 64, 3)
    lacking = to_zimage_form(tensors, "decoder")
    del lacking["layers.1.attention.qkv.weight"]
    save_file(lacking, path)
    with pytest.raises(CheckpointError, match=r"no layers\.1\.attention\.qkv\.weight"):
        LLaDAUni(checkpoint_copy)


def test_features_are_what_decode_uses_and_a_batch_has_one_size(golden_checkpoint):
    model = LLaDAUni(golden_checkpoint)
    grids = tuple(torch.full((2, 3), code, dtype=torch.int64) for code in (1, 2))
    features, shape = features_of(model, ImageTokens(grids, model.codebook_size))
    assert shape == (2, 16, 8, 12)
    assert features.shape == (2, 24, 48)
    assert not torch.equal(features[0], features[1])
    other = ImageTokens((*grids, torch.zeros(3, 2, dtype=torch.int64)), model.codebook_size)
    with pytest.raises(InputError, match=r"grids of 2 x 3, 3 x 2.*one size"):
        features_of(model, other)
