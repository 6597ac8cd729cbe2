"""python -m llada_core.quantization: what the new folder holds, how it opens, and that it tells the truth."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llada_core.checkpoint.layout import QUANTIZATION, Layout
from llada_core.conversion.check import check_samples, check_tensors
from llada_core.conversion.convert import convert
from llada_core.conversion.options import Conversion
from llada_core.conversion.parts import new_files, open_parts
from llada_core.conversion.record import RECORD
from llada_core.engine import LLaDAUni
from llada_core.errors import CheckpointError
from llada_core.options import Decoding, Sampling
from llada_core.placement import OneDevice
from llada_core.quantization.choices import FORMS
from llada_core.quantization.formats import Dense, FP8Block, Int8, decode_metadata, format_of

BANK = "model.layers.1.mlp.experts.gate_up"


@pytest.fixture(scope="session")
def converted(golden_checkpoint, tmp_path_factory):
    """converted(backbone): the golden checkpoint converted once, decoders and vision to 8 bits; read only."""
    folders = {}

    def make(backbone: str) -> Path:
        if backbone not in folders:
            folders[backbone] = tmp_path_factory.mktemp("converted") / backbone
            convert(golden_checkpoint, folders[backbone], Conversion(backbone, vision="int8"))
        return folders[backbone]

    return make


def loaded(component, asked=None) -> dict[str, torch.Tensor]:
    return component.load(torch.float32, asked=asked).state_dict()


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("backbone", ["int4", "int4-128", "int8", "fp8", "keep"])
def test_the_new_folder_is_the_old_one_quantized(backbone, converted, model):
    """Bit by bit what the loader makes of the old folder; and what is not quantized is as it was."""
    opened = LLaDAUni(converted(backbone))
    for part, component in model.components.items():
        form = {"backbone": FORMS[backbone], "sigvq": None, "vae": None}.get(part, Int8())
        expected, found = loaded(component, form), loaded(opened.components[part])
        assert found.keys() == expected.keys(), part
        for name in expected:
            assert torch.equal(bytes_of(found[name]), bytes_of(expected[name])), (part, name)


@pytest.mark.parametrize("backbone", ["int4", "int4-128", "int8", "fp8", "keep"])
def test_a_picture_from_the_new_folder(backbone, converted, model):
    """The tokens and the picture of a model that was quantized while it was read."""
    asked = {"sampling": Sampling(steps=2)}
    weights = {"int4": "4-bit", "int8": "8-bit"}.get(backbone)
    opened = LLaDAUni(converted(backbone))
    drawn = opened.generate("fox", 64, 64, **asked).tokens
    (image,) = opened.decode(drawn, Decoding(steps=2))
    assert image.isfinite().all()
    if weights is not None:
        other = LLaDAUni(model.layout.root, OneDevice(weights=weights))
        assert torch.equal(drawn.grids[0], other.generate("fox", 64, 64, **asked).tokens.grids[0])
        assert torch.equal(image, other.decode(drawn, Decoding(steps=2))[0])
    if backbone == "keep":
        assert torch.equal(drawn.grids[0], model.generate("fox", 64, 64, **asked).tokens.grids[0])


def test_banks_are_whole_contiguous_and_on_a_page(converted, golden_backbone):
    """So that a host can map them: nothing of the new folder's backbone is read where it may stay a slice of a map."""
    folder = converted("int4")
    component = LLaDAUni(folder).components["backbone"]
    entries = component.source.entries
    for layer in (1, 2):
        for bank in ("gate_up", "down"):
            key = f"model.layers.{layer}.mlp.experts.{bank}"
            assert f"{key}.weight" in entries
            assert not [name for name in entries if name.startswith(f"model.layers.{layer}.mlp.experts.0.")]
    # Every tensor begins where its type lets it, and the data of a file on a page.
    for key, entry in entries.items():
        size = {"F32": 4, "BF16": 2, "I8": 1, "U8": 1}[entry.dtype]
        assert entry.offset % size == 0, key
    assert min(entry.offset for entry in entries.values()) % 4096 == 0
    maps = {path: load_file(path) for path in folder.glob("model-*.safetensors")}
    module = component.load(torch.float32, mapped=maps.__getitem__)
    ours = {tensor.data_ptr() for tensors in maps.values() for tensor in tensors.values()}
    assert all(tensor.data_ptr() in ours for tensor in module.state_dict().values())


def test_other_tools_can_read_what_is_stored(converted):
    """The host's own keys and terms, in the file."""
    folder = converted("int8")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weights = [key for key in index["weight_map"] if key.endswith(".comfy_quant")]
    assert len(weights) == 3 * 2 + 3 + 2 * (2 + 3)
    with safe_open(folder / index["weight_map"][f"{BANK}.weight"], framework="pt") as file:
        said = decode_metadata(file.get_tensor(f"{BANK}.comfy_quant"), "x")
        assert said == {"format": "int8_tensorwise", "num_experts": 8}
        assert format_of(said, "x") == Int8()
        assert file.get_tensor(f"{BANK}.weight_scale").shape == (8, 64, 1)
    assert index["metadata"]["total_size"] <= sum(path.stat().st_size for path in folder.glob("model-*.safetensors"))
    with safe_open(folder / "decoder" / "decoder_model.safetensors", framework="pt") as file:
        assert "layers.0.attention.to_q.comfy_quant" in file.keys()
        assert "semantic_embedder.1.weight" in file.keys(), "the released names"
        assert "layers.0.adaLN_modulation.0.comfy_quant" not in file.keys()


@pytest.mark.parametrize(("backbone", "least", "most"), [("int4", 0.25, 0.5), ("int8", 0.3, 0.6), ("fp8", 0.3, 0.6)])
def test_sizes_on_disk(backbone, least, most, converted, model):
    """Of a float32 checkpoint, whose embeddings and heads weigh more than the release's; tiny groups cost much."""
    size = sum(LLaDAUni(converted(backbone)).components["backbone"].stored.values())
    before = sum(model.components["backbone"].stored.values())
    assert least < size / before < most


def test_the_fp8_release_converts_too(checkpoint_copy, rewrite, stacked, tmp_path, model):
    """To 4 bits, from its dequantized weights; and kept, its blocks as they were, its experts in one bank a layer."""
    form = FP8Block()

    def fp8(tensors):
        out = {}
        for key, value in tensors.items():
            if value.ndim == 2 and ("_proj" in key or ".attention." in key):
                stored = form.quantize(value)
                out |= {
                    key: stored["weight"],
                    key.removesuffix("weight") + "weight_scale_inv": stored["weight_scale_inv"],
                }
            else:
                out[key] = value.bfloat16()
        return out

    rewrite(checkpoint_copy, fp8)
    source = LLaDAUni(checkpoint_copy).components["backbone"]
    for name in ("keep", "int8"):
        convert(checkpoint_copy, tmp_path / name, Conversion(name, "keep"))
        found = LLaDAUni(tmp_path / name).components["backbone"]
        if name == "keep":
            expected = loaded(source)
        else:  # what an 8-bit reading leaves alone, the conversion does
            assert next(iter(found.stored)) is Int8
            dense = source.load(torch.float32, asked=Dense(torch.float32)).state_dict()
            scale = found.load(torch.float32).layers[1].mlp.experts.down.weight_scale
            assert torch.equal(scale, Int8().quantize(dense["layers.1.mlp.experts.down.weight"])["weight_scale"])
            continue
        for key, tensor in loaded(found).items():
            assert torch.equal(bytes_of(tensor), bytes_of(expected[key])), key


def test_config_says_that_it_was_converted(converted, checkpoint_copy, edit_json, tmp_path):
    config = json.loads((converted("int4") / "config.json").read_text())
    assert config[QUANTIZATION]["version"] == 1
    assert set(config[QUANTIZATION]["parts"]) == {"backbone", "image_tokenizer", "decoder", "decoder-turbo"}
    assert config[QUANTIZATION]["parts"]["backbone"].startswith("int4, group_size 64")
    # What the FP8 release says of itself is no longer so.
    edit_json(checkpoint_copy / "config.json", lambda config: config | {"quantization_config": {"quant_method": "fp8"}})
    for name, said in (("int8", False), ("keep", True)):
        convert(checkpoint_copy, tmp_path / name, Conversion(name, parts=("backbone",)))
        assert ("quantization_config" in json.loads((tmp_path / name / "config.json").read_text())) == said


def test_files_that_stay_are_linked_where_they_are_large(golden_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("llada_core.conversion.convert.LINKED", 100_000)
    record = convert(golden_checkpoint, tmp_path / "new", Conversion("int8", "keep"))
    linked = {path for path, how in record.kept.items() if how == "linked"}
    assert "decoder/decoder_model.safetensors" in linked
    assert "tokenizer.json" not in linked
    for path, how in record.kept.items():
        assert os.path.samefile(golden_checkpoint / path, tmp_path / "new" / path) == (how == "linked")
    assert "Hard links" in (tmp_path / "new" / "README.md").read_text()
    record = convert(golden_checkpoint, tmp_path / "copied", Conversion("int8", "keep"), link=False)
    assert set(record.kept.values()) == {"copied"}
    assert "Hard links" not in (tmp_path / "copied" / "README.md").read_text()


def test_only_some_parts(golden_checkpoint, tmp_path):
    convert(golden_checkpoint, tmp_path / "new", Conversion("int8", parts=("backbone", "image_tokenizer")))
    layout = Layout.open(tmp_path / "new")
    assert set(layout.missing) == {"sigvq", "decoder", "decoder-turbo", "vae"}
    assert "| decoder | left out | | |" in (tmp_path / "new" / "README.md").read_text()


def test_a_source_with_some_parts_only(checkpoint_copy, tmp_path):
    (checkpoint_copy / "image_tokenizer" / "sigvq_embedding.pt").unlink()
    (checkpoint_copy / "decoder" / "decoder_model.safetensors").rename(
        checkpoint_copy / "decoder" / "model.safetensors"
    )
    convert(checkpoint_copy, tmp_path / "new", Conversion("int8"))
    assert set(Layout.open(tmp_path / "new").missing) == {"sigvq"}
    # Without the embedder nothing says how wide a decoder's features are, so the decoders stay as they are.
    assert (tmp_path / "new" / "decoder" / "model.safetensors").is_file()


def test_the_card_tells_what_was_done(converted):
    card = (converted("int4") / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nbase_model: inclusionAI/LLaDA2.0-Uni\n")
    assert "--backbone int4 --decoder int8 --vision int8" in card
    assert re.search(r"\| backbone \| 4 bits, a scale and a zero for each 64 inputs \| 0\.00\d+ \| 0\.00\d+ \|", card)
    assert "| vae | as they were |" in card
    assert "comfy_quant" in card
    assert str(converted("int4").parent) not in card, "no paths"


def test_the_cards_errors_are_the_layers(converted, golden_backbone):
    card, form = (converted("int4") / "README.md").read_text(), FORMS["int4"]
    found = []
    for name, weight in golden_backbone.state_dict().items():
        if ".mlp.experts.down." in name:
            back = form.dequantize(form.quantize(weight), weight.shape[-1], torch.float32)
            found.append(float((back - weight).norm() / weight.norm()))
    mean, largest = sum(found) / len(found), max(found)
    assert f"| backbone | experts, down | {mean:.4f} | {largest:.4f} |" in card
    for kind in ("attention", "dense MLP", "shared experts", "experts, gate and up"):
        assert f"| backbone | {kind} |" in card
    assert "| decoder-turbo | MLP |" in card
    assert "| image_tokenizer | attention |" in card


# Reading back


def rewritten(path: Path, change) -> None:
    tensors = load_file(path)
    save_file(change(tensors), path, metadata={"format": "pt"})


@pytest.fixture
def finished(golden_checkpoint, tmp_path):
    """A conversion to 8 bits, its record, its parts and its files."""
    record = convert(golden_checkpoint, tmp_path / "new", Conversion("int8"))
    record.folder = tmp_path / "new"
    layout = Layout.open(golden_checkpoint)
    old = open_parts(layout, LLaDAUni(golden_checkpoint).config)
    files = [file for part in ("backbone", "decoder") for file in new_files(part, old[part], Int8())]
    return tmp_path / "new", record, old, files


def test_a_tensor_that_reads_back_differently_is_noticed(finished):
    folder, record, _, _ = finished
    check_tensors(folder, record, lambda share: None)
    path = folder / "model-00002-of-00004.safetensors"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"backbone: model-00002-of-00004\.safetensors: found .* other than"):
        check_tensors(folder, record, lambda share: None)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {f"{BANK}.weight": t[f"{BANK}.weight"].roll(1, 0)},  # another expert's
        lambda t: t | {f"{BANK}.weight": t[f"{BANK}.weight"].roll(32, 1)},  # gate and up exchanged
        lambda t: t | {f"{BANK}.weight_scale": t[f"{BANK}.weight_scale"] * 1.1},
    ],
    ids=["experts", "gate and up", "scales"],
)
def test_weights_that_are_not_the_old_ones_are_noticed(change, finished):
    folder, record, old, files = finished
    config = LLaDAUni(folder).config
    check_samples(old, open_parts(Layout.open(folder), config), files, record)
    rewritten(folder / "model-00002-of-00004.safetensors", change)
    with pytest.raises(
        CheckpointError, match=r"backbone: found layers\.1\.mlp\.experts\.gate_up\.weight with a relative"
    ):
        check_samples(old, open_parts(Layout.open(folder), config), files, record)


def test_the_record_has_every_tensor(converted):
    record = json.loads((converted("fp8") / RECORD).read_text())
    keys = {key for noted in record["files"].values() for key in noted["crc32"]}
    index = json.loads((converted("fp8") / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) <= keys
    assert f"{BANK}.weight_scale_inv" in index
