"""Quantized weights from files into modules: the FP8 release, and layers that are quantized while they are read."""

from functools import partial

import pytest
import torch

from llada_core.backbone.keys import open_backbone
from llada_core.checkpoint import loading
from llada_core.checkpoint.layout import Layout
from llada_core.engine import LLaDAUni
from llada_core.errors import InputError
from llada_core.options import Decoding, Sampling
from llada_core.placement import OneDevice
from llada_core.quantization.formats import Dense, FP8Block, Int4, Int8


def load_backbone(folder, config, asked=None):
    return open_backbone(Layout.open(folder).backbone_files(), config).load(torch.float32, asked=asked)


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


# FP8


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the FP8 release holds of a matrix: float8 values and a scale per 128 x 128 block."""
    scale = torch.empty(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
    blocks = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
            scale[i, j] = weight[part].abs().max() / 448
            blocks[part] = (weight[part] / scale[i, j]).to(torch.float8_e4m3fn)
    return blocks, scale


def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What such a matrix stands for."""
    return FP8Block().dequantize({"weight": weight, "weight_scale_inv": scale}, weight.shape[-1], torch.float32)


def fp8(tensors: dict) -> dict:
    """The golden backbone as the FP8 release stores one: projections quantised, the rest as it was."""
    out = {}
    for key, value in tensors.items():
        if (value.ndim == 2 and "_proj" in key) or (".attention." in key and value.ndim == 2):
            out[key], out[key.removesuffix(".weight") + ".weight_scale_inv"] = quantize(value)
        else:
            out[key] = value
    return out


@pytest.mark.parametrize(("rows", "columns"), [(200, 150), (128, 256), (1, 300), (129, 127)])
def test_blocks_that_do_not_fill_the_matrix(rows, columns):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator) * 50
    blocks, scale = quantize(weight)
    assert scale.shape == (-(-rows // 128), -(-columns // 128))
    found = dequantize(blocks, scale)
    for i in range(rows):
        expected = blocks[i].float() * scale[i // 128].repeat_interleave(128)[:columns]
        assert torch.equal(found[i], expected)
    assert (found - weight).norm() < 0.05 * weight.norm()


def test_a_bank_of_blocks():
    banks = [quantize(torch.randn(130, 140, generator=torch.Generator().manual_seed(seed))) for seed in range(3)]
    values, scales = (torch.stack([part.float() for part in parts]) for parts in zip(*banks, strict=True))
    found = dequantize(values.to(torch.float8_e4m3fn), scales)
    for i, (blocks, scale) in enumerate(banks):
        assert torch.equal(found[i], dequantize(blocks, scale))


def test_fp8_release_is_its_dequantised_weights(checkpoint_copy, rewrite, golden_backbone):
    rewrite(checkpoint_copy, fp8)
    found = load_backbone(checkpoint_copy, golden_backbone.config, asked=Dense(torch.float32))

    def plain(tensors):
        scales = {key: tensors.pop(key) for key in list(tensors) if key.endswith("_scale_inv")}
        return {
            k: dequantize(t, scales[k + "_scale_inv"]) if "float8" in str(t.dtype) else t for k, t in tensors.items()
        }

    rewrite(checkpoint_copy, plain)
    assert_same(found, load_backbone(checkpoint_copy, golden_backbone.config))
    quantised = 0
    for name, weight in golden_backbone.state_dict().items():
        error = ((found.state_dict()[name] - weight).norm() / weight.norm()).item()
        assert error < 0.04, "three bits of mantissa"
        quantised += error > 0
    assert quantised == 3 * 2 + 3 + 2 * (2 + 3)  # attention, a dense MLP, and two banks and a shared MLP a layer


def logits(backbone, oracle) -> torch.Tensor:
    """Of 64 random tokens in two blocks."""
    at = torch.arange(64)
    visible = (at[:, None] // 32 >= at // 32)[None]
    ids = torch.randint(0, 704, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone.lm_head(oracle.recomputing(backbone)(ids, at[None], visible)[0])


def test_fp8_release_predicts_nearly_the_same(checkpoint_copy, rewrite, golden_backbone, oracle):
    rewrite(checkpoint_copy, fp8)
    found = logits(load_backbone(checkpoint_copy, golden_backbone.config), oracle).flatten()
    # Random routers flip at the least disturbance; weights without their scales would leave nothing alike.
    assert torch.cosine_similarity(found, logits(golden_backbone, oracle).flatten(), dim=0) > 0.9


@pytest.mark.parametrize("change", [None, "", ".weight"], ids=["per expert", "stacked", "stacked with .weight"])
def test_fp8_stays_fp8_in_memory(change, stacked, checkpoint_copy, rewrite, golden_backbone):
    """Bytes as they are in the file, whatever the form of the keys; blocks of gate and up begin anew in their bank."""
    rewrite(checkpoint_copy, lambda tensors: fp8(tensors) if change is None else stacked(fp8(tensors), change))
    component = open_backbone(Layout.open(checkpoint_copy).backbone_files(), golden_backbone.config)
    found, dense = component.load(torch.float32), component.load(torch.float32, asked=Dense(torch.float32))
    tensors = found.state_dict()
    fp8_names = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    assert fp8_names == set(component.quantizable)
    assert len(fp8_names) == 3 * 2 + 3 + 2 * (2 + 3)
    assert component.bytes(torch.float32) == sum(tensor.nbytes for tensor in tensors.values())
    for name, weight in dense.state_dict().items():
        if name in fp8_names:
            layer = found.get_submodule(name.removesuffix(".weight"))
            stored = {suffix: getattr(layer, suffix) for suffix in layer.form.tensors(layer.shape)}
            assert torch.equal(layer.form.dequantize(stored, weight.shape[-1], torch.float32), weight), name
        else:
            assert torch.equal(tensors[name], weight), name


def test_fp8_is_kept_where_nothing_else_is_asked_for(checkpoint_copy, rewrite, golden_backbone):
    rewrite(checkpoint_copy, lambda tensors: fp8({key: tensor.bfloat16() for key, tensor in tensors.items()}))
    component = open_backbone(Layout.open(checkpoint_copy).backbone_files(), golden_backbone.config)
    cpu, mps = torch.device("cpu"), torch.device("mps")
    assert list(component.stored) == [FP8Block, Dense]
    asked = partial(component.asked, "as stored", "backbone")
    assert asked(None, cpu) is None
    assert asked(torch.float16, cpu) == Dense(torch.float16)
    assert asked(None, mps) == Dense(torch.bfloat16), "a type that device has not"
    assert component.asked("8-bit", "backbone", torch.float16, cpu) == Int8()
    assert component.asked("4-bit", "vae", None, cpu) is None
    # 8 bits are not made of 8 bits; 4 are.
    assert component.forms(torch.float32, Int8()) == component.forms(torch.float32)
    assert set(component.forms(torch.float32, Int4()).values()) == {Dense(torch.float32), Int4()}


def test_fp8_release_loads_as_bfloat16_by_itself(checkpoint_copy, rewrite, golden_backbone):
    def all_fp8(tensors):
        return fp8({key: t if "_proj" in key else t.bfloat16() for key, t in tensors.items()})

    rewrite(checkpoint_copy, all_fp8)
    model = LLaDAUni(checkpoint_copy)
    assert model.components["backbone"].dtype == torch.bfloat16
    drawn = model.generate("fox", 64, 64, sampling=Sampling(steps=2))
    assert drawn.tokens.sizes == [(2, 2)]
    types = {tensor.dtype for tensor in model._place("backbone").module.state_dict().values()}
    assert types == {torch.bfloat16, torch.float32, torch.float8_e4m3fn}


# Quantized while reading


@pytest.mark.parametrize("form", [Int8(), Int4(), FP8Block()], ids=lambda form: form.name)
@pytest.mark.parametrize("per_expert", [True, False])
def test_quantized_while_read_is_the_dense_weight_quantized(
    form, per_expert, stacked, checkpoint_copy, rewrite, golden_backbone
):
    if not per_expert:
        rewrite(checkpoint_copy, stacked)
    component = open_backbone(Layout.open(checkpoint_copy).backbone_files(), golden_backbone.config)
    found = component.load(torch.float32, asked=form)
    assert component.bytes(torch.float32, form) == sum(tensor.nbytes for tensor in found.state_dict().values())
    for name, weight in golden_backbone.state_dict().items():
        if name not in component.quantizable:
            assert torch.equal(found.state_dict()[name], weight), name
            continue
        layer = found.get_submodule(name.removesuffix(".weight"))
        for suffix, tensor in layer.form.quantize(weight).items():
            assert torch.equal(getattr(layer, suffix), tensor), (name, suffix)


def test_experts_that_lie_one_by_one_are_quantized_together(golden_checkpoint, golden_backbone, monkeypatch):
    """As many at a time as a chunk holds, each read once; the result does not depend on it."""
    component = open_backbone(Layout.open(golden_checkpoint).backbone_files(), golden_backbone.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in component.module.state_dict().items()}
    forms = component.forms(torch.float32, Int4())
    name = "layers.1.mlp.experts.down.weight"
    slots = {key: slot for key, slot in component.slots.items() if slot.name == name}
    experts, expert_bytes = shapes[name][0], 4 * shapes[name][1] * shapes[name][2]
    whole = component.load(torch.float32, asked=Int4()).state_dict()
    for chunk, most in ((1, 1), (3 * expert_bytes, 3), (2**30, experts)):
        monkeypatch.setattr(loading, "CHUNK", chunk)
        found = loading.pieces(component.source, slots, shapes, forms, torch.device("cpu"))
        sizes = [piece.shape[0] if len(piece.shape) == 3 else 1 for piece in found]
        assert sum(sizes) == experts
        assert max(sizes) == most
        again = component.load(torch.float32, asked=Int4()).state_dict()
        assert all(torch.equal(again[key], value) for key, value in whole.items())


def test_only_what_computes_much_is_quantized(model):
    """Router, norms, embeddings, head; the decoders' embedders, modulation and ends: they keep their type."""
    for part, kept in {
        "backbone": {"word_embeddings.weight", "lm_head.weight", "layers.1.mlp.gate.weight"},
        "decoder": {"t_embedder.mlp.0.weight", "layers.0.adaLN_modulation.0.weight", "cap_embedder.1.weight"},
        "image_tokenizer": {"vqmodel.quantize.embedding.weight", "visual.embeddings.position_embedding.weight"},
    }.items():
        names = set(model.components[part].module.state_dict())
        assert kept <= names, part
        assert not kept & set(model.components[part].quantizable)
    assert model.components["sigvq"].quantizable == model.components["vae"].quantizable == {}


@pytest.mark.parametrize("weights", ["8-bit", "4-bit"])
def test_a_model_of_fewer_bits(weights, golden_checkpoint, golden_backbone, oracle):
    """The whole way from a prompt to a picture, and logits that still are the model's."""
    model = LLaDAUni(golden_checkpoint, OneDevice(weights=weights))
    drawn = model.generate("fox", 64, 64, sampling=Sampling(steps=2))
    (image,) = model.decode(drawn.tokens, Decoding(steps=2))
    assert image.isfinite().all()
    forms = {part: model._place(part).module.state_dict() for part in ("backbone", "decoder-turbo")}
    assert {tensor.dtype for tensor in forms["backbone"].values()} >= {torch.int8, torch.float32}
    assert {tensor.dtype for tensor in forms["decoder-turbo"].values()} == {torch.int8, torch.float32}
    found = logits(model._place("backbone").module, oracle).flatten()
    likeness = torch.cosine_similarity(found, logits(golden_backbone, oracle).flatten(), dim=0)
    assert likeness > {"8-bit": 0.97, "4-bit": 0.7}[weights]


def test_opening_says_what_the_files_hold_in_one_line(checkpoint_copy, rewrite, caplog):
    rewrite(checkpoint_copy, lambda tensors: fp8({key: tensor.bfloat16() for key, tensor in tensors.items()}))
    with caplog.at_level("INFO"):
        model = LLaDAUni(checkpoint_copy)
    (line,) = (record.getMessage() for record in caplog.records if "backbone fp8_block" in record.getMessage())
    assert line.startswith("checkpoint checkpoint: backbone fp8_block 0.000")
    size = sum(path.stat().st_size for path in checkpoint_copy.glob("model*.safetensors"))
    assert sum(model.components["backbone"].stored.values()) == pytest.approx(size, rel=0.15), "less the header"
    assert "vae float32 0.0" in line
    described = model.components["backbone"].describe
    assert described(torch.float16) == "as fp8_block, the rest float16, 0.000389 GB"
    assert described(torch.float16, Dense(torch.float16)).startswith("as float16, 0.000")
    assert described(torch.float16, Dense(torch.float16)).endswith("(stored as fp8_block)")


def test_another_choice_of_weights_is_refused():
    with pytest.raises(InputError, match="weights: found '2-bit'; expected one of as stored, 8-bit, 4-bit"):
        OneDevice(weights="2-bit")
