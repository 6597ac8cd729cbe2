"""Files of the decoder and the VAE that fit, and those that do not."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llada_core.decoder.decode import (
    AXES_LENS,
    DECODER_FILES,
    VAE_FILE,
    open_decoder,
    open_vae,
)
from llada_core.errors import CheckpointError

CPU = torch.device("cpu")
WIDTH = 48  # of the golden checkpoint's features


# Opening


def test_the_files_configuration_is_overridden_and_its_names_translated(golden_checkpoint):
    component = open_decoder(golden_checkpoint / "decoder", WIDTH)
    config = component.module.config
    assert list(config["axes_lens"]) == list(AXES_LENS) == [32768, 1024, 1024]
    assert config["cap_feat_dim"] == WIDTH
    tensors = load_file(golden_checkpoint / "decoder" / DECODER_FILES[0])
    loaded = component.load(torch.float32)
    assert torch.equal(loaded.cap_embedder[1].weight, tensors["semantic_embedder.1.weight"])
    assert component.bytes(torch.float32) == sum(t.nbytes for t in tensors.values())


@pytest.fixture
def folder(checkpoint_copy) -> Path:
    return checkpoint_copy / "decoder"


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_the_mirrors_file_name_is_accepted(folder):
    (folder / "decoder_model.safetensors").rename(folder / "model.safetensors")
    assert open_decoder(folder, WIDTH).slots


def test_unknown_fields_are_named_in_one_line(folder, caplog):
    caplog.set_level(logging.INFO)
    edit(folder / "config.json", semantic_dim=4096, scheduler="x")
    open_decoder(folder, WIDTH)
    lines = [record.getMessage() for record in caplog.records if "semantic_dim" in record.getMessage()]
    assert len(lines) == 1
    assert "scheduler" in lines[0]
    assert "_class_name" not in lines[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"dim": None},
        {"dim": "64"},
        {"n_layers": 0},
        {"n_layers": True},
        {"in_channels": -16},
        {"n_heads": 3},
        {"axes_dims": [8, 8, 8]},
        {"all_patch_size": [4]},
        {"all_patch_size": [2, 4], "all_f_patch_size": [1, 1]},
        {"all_f_patch_size": [2]},
        {"all_patch_size": 2},
    ],
)
def test_decoder_configurations_that_are_refused(folder, fields):
    edit(folder / "config.json", **fields)
    with pytest.raises(CheckpointError, match=r"decoder: config\.json"):
        open_decoder(folder, WIDTH)


def test_missing_decoder_files_are_refused(folder):
    (folder / DECODER_FILES[0]).unlink()
    with pytest.raises(CheckpointError, match=r"decoder: decoder_model\.safetensors: found no such file"):
        open_decoder(folder, WIDTH)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"decoder: config\.json: found no such file"):
        open_decoder(folder, WIDTH)


@pytest.mark.parametrize("kept", [0, 100, -64])
def test_a_truncated_decoder_file_is_refused(folder, kept):
    path = folder / DECODER_FILES[0]
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"decoder_model\.safetensors.*unreadable"):
        open_decoder(folder, WIDTH)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("layers.1.attention.to_q.weight"), r"layers\.1\.attention\.to_q\.weight"),
        (lambda t: t.pop("semantic_embedder.1.bias"), r"cap_embedder\.1\.bias"),
        (lambda t: t.update(x_pad_token=torch.zeros(1, 65)), r"x_pad_token of shape \[1, 65\]"),
        (lambda t: t.update(extra=torch.zeros(1)), "the unknown tensor extra"),
    ],
)
def test_decoder_files_of_another_model_are_refused(folder, change, named):
    rewrite(folder / DECODER_FILES[0], change)
    with pytest.raises(CheckpointError, match=named):
        open_decoder(folder, WIDTH)


def test_features_of_another_width_are_refused(folder):
    with pytest.raises(CheckpointError, match=r"semantic_embedder\.\d\.weight of shape"):
        open_decoder(folder, WIDTH + 1)


@pytest.mark.parametrize("name", ["config.json", VAE_FILE])
def test_a_missing_vae_is_refused(checkpoint_copy, name):
    (checkpoint_copy / "vae" / name).unlink()
    with pytest.raises(CheckpointError, match=f"vae: {name}: found no such file"):
        open_vae(checkpoint_copy / "vae")


@pytest.mark.parametrize(
    "fields",
    [
        {"latent_channels": None},
        {"scaling_factor": None},
        {
            "block_out_channels": [16] * 3,
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
        },
        {"block_out_channels": 16},
        {"up_block_types": ["NoSuchBlock"] * 4},
    ],
)
def test_vae_configurations_that_are_refused(checkpoint_copy, fields):
    edit(checkpoint_copy / "vae" / "config.json", **fields)
    with pytest.raises(CheckpointError, match=r"vae: config\.json"):
        open_vae(checkpoint_copy / "vae")


def test_a_vae_of_another_shape_is_refused(checkpoint_copy):
    rewrite(checkpoint_copy / "vae" / VAE_FILE, lambda t: t.update({"decoder.conv_out.bias": torch.zeros(4)}))
    with pytest.raises(CheckpointError, match=r"decoder\.conv_out\.bias of shape \[4\]"):
        open_vae(checkpoint_copy / "vae")
