"""Checkpoints that are incomplete, damaged or of another model: refused when opened, and the message says all.

Every message names the file, what was found, what was expected and what to do.
"""

import json
import pickle
import re
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from llada_core.backbone.config import BackboneConfig
from llada_core.engine import LLaDAUni
from llada_core.errors import CheckpointError, InputError
from llada_core.image_tokens import ImageTokens
from llada_core.options import Sampling

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
DENSE = "model.layers.1.attention.dense.weight"


def refused(folder, *parts: str) -> str:
    """Open, expect a refusal whose message has all `parts`, in order."""
    with pytest.raises(CheckpointError) as caught:
        LLaDAUni(folder)
    message = str(caught.value)
    at = 0
    for part in parts:
        assert part in message[at:], message
        at = message.index(part, at) + len(part)
    assert re.fullmatch(r".+: found .+; expected .+\. .+", message, re.DOTALL)
    return message


# Files


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_missing_file_of_the_root(name, checkpoint_copy):
    (checkpoint_copy / name).unlink()
    refused(checkpoint_copy, f"no {name}", "expected a LLaDA2.0-Uni folder", "hf download inclusionAI/LLaDA2.0-Uni")


def test_missing_shard(checkpoint_copy):
    (checkpoint_copy / SHARD).unlink()
    refused(checkpoint_copy, f"backbone: {SHARD}", "no such file", "expected", "Download")


def test_no_weights_at_all(checkpoint_copy):
    for path in checkpoint_copy.glob("model*"):
        path.unlink()
    refused(checkpoint_copy, "backbone: model.safetensors", "no such file")


@pytest.mark.parametrize("size", [0, 4, 5000, -1])
def test_truncated_shard(size, checkpoint_copy):
    path = checkpoint_copy / SHARD
    data = path.read_bytes()[:size]
    path.write_bytes(data)
    refused(checkpoint_copy, f"backbone: {SHARD}", f"unreadable file of {len(data)} bytes", "whole safetensors file")


@pytest.mark.parametrize(
    "path", ["image_tokenizer/image_tokenizer.safetensors", "decoder/decoder_model.safetensors", "vae/config.json"]
)
def test_damaged_part(path, checkpoint_copy):
    (checkpoint_copy / path).write_bytes(b"<html>404</html>")
    part, name = path.split("/")
    refused(checkpoint_copy, f"{part}: {name}", "unreadable", "Download")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\xff"])
def test_unreadable_configuration(text, checkpoint_copy):
    (checkpoint_copy / "config.json").write_text(text, encoding="latin-1")
    refused(checkpoint_copy, "backbone: config.json", "expected a JSON object", "Download")


def test_index_that_points_outside_the_folder(checkpoint_copy, edit_json):
    (checkpoint_copy.parent / "outside.safetensors").write_bytes((checkpoint_copy / SHARD).read_bytes())
    for outside in ("../outside.safetensors", str(checkpoint_copy.parent / "outside.safetensors")):
        edit_json(checkpoint_copy / INDEX, lambda index, to=outside: index | {"weight_map": {DENSE: to}})
        refused(checkpoint_copy, INDEX, outside, "file names of this folder", "Do not use this checkpoint")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": [1]}, {"weight_map": {DENSE: 3}}])
def test_index_without_a_map(index, checkpoint_copy):
    (checkpoint_copy / INDEX).write_text(json.dumps(index))
    refused(checkpoint_copy, INDEX, "expected", "Download it again")


def test_index_that_lists_a_tensor_its_shards_lack(checkpoint_copy, edit_json):
    extra = {"model.layers.9.input_layernorm.weight": SHARD}
    edit_json(checkpoint_copy / INDEX, lambda index: index | {"weight_map": index["weight_map"] | extra})
    refused(checkpoint_copy, SHARD, "no model.layers.9.input_layernorm.weight", "every tensor of the index")


# Tensors


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda t: t | {DENSE: torch.zeros(3, 4)},
            [f"{DENSE} of shape [3, 4]", "expected shape [64, 128]", "config.json belong to different models"],
        ),
        (lambda t: t | {"model.extra.weight": torch.zeros(3)}, ["unknown tensor model.extra.weight", "another model"]),
        (
            lambda t: t | {"model.layers.1.mlp.experts.8.up_proj.weight": torch.zeros(32, 64)},
            ["unknown tensor model.layers.1.mlp.experts.8.up_proj.weight"],  # there are 8, from 0
        ),
        (
            lambda t: {key: value for key, value in t.items() if key != DENSE},
            ["no complete layers.1.attention.dense.weight (1 tensors absent)", "Download the checkpoint again"],
        ),
        (
            lambda t: {k: v for k, v in t.items() if k != "model.layers.2.mlp.experts.3.down_proj.weight"},
            ["no complete layers.2.mlp.experts.down.weight"],
        ),
        (
            lambda t: t | {DENSE: t[DENSE].to(torch.float8_e4m3fn)},
            [f"{DENSE}: found no weight_scale_inv", "weight_scale_inv of shape [1, 1]", "fp8_block", "ownload"],
        ),
        (
            lambda t: (
                t
                | {
                    DENSE: t[DENSE].to(torch.float8_e4m3fn),
                    DENSE.removesuffix(".weight") + ".weight_scale_inv": torch.ones(2, 1),
                }
            ),
            [f"{DENSE}: found weight_scale_inv of shape [2, 1]", "of shape [1, 1]"],
        ),
        (lambda t: t | {DENSE: t[DENSE].to(torch.int8)}, ["type I8", "expected", "bf16 or FP8 release"]),
        (lambda t: t | {DENSE: t[DENSE].to(torch.int64)}, [f"{DENSE} of type I64", "bf16 or FP8 release"]),
        (
            lambda t: t | {DENSE: t[DENSE].to(torch.float8_e5m2), DENSE + "_scale_inv": torch.ones(1, 1)},
            ["F8_E5M2", "bf16 or FP8 release"],
        ),
    ],
    ids=[
        "shape",
        "unknown",
        "expert beyond the last",
        "absent",
        "expert absent",
        "no scale",
        "scale of another shape",
        "int8",
        "int64",
        "another float8",
    ],
)
def test_tensors_that_do_not_fit(change, parts, checkpoint_copy, rewrite):
    rewrite(checkpoint_copy, change)
    refused(checkpoint_copy, "backbone", *parts)


# Configuration


@pytest.mark.parametrize(
    ("field", "value", "parts"),
    [
        ("hidden_size", None, ["no field hidden_size"]),
        ("hidden_size", "64", ["hidden_size = '64'", "a whole number from 1 up"]),
        ("num_hidden_layers", 0, ["num_hidden_layers = 0"]),
        ("n_group", 0, ["n_group = 0"]),
        ("num_key_value_heads", True, ["num_key_value_heads = True"]),
        ("rope_theta", float("nan"), ["rope_theta = nan"]),
        ("hidden_act", "gelu", ["hidden_act = 'gelu'", "'silu'", "another architecture"]),
        ("score_function", "softmax", ["score_function = 'softmax'", "'sigmoid'"]),
        ("rope_scaling", {"type": "yarn"}, ["rope_scaling = {'type': 'yarn'}", "None"]),
        ("tie_word_embeddings", True, ["tie_word_embeddings = True", "False"]),
        ("image_token_offset", 704, ["0 < image_token_offset < vocab_size"]),
        ("num_key_value_heads", 3, ["num_attention_heads a multiple of num_key_value_heads"]),
        ("n_group", 3, ["num_experts a multiple of n_group"]),
        ("topk_group", 5, ["topk_group from 1 to n_group"]),
        ("num_experts_per_tok", 5, ["num_experts_per_tok at most the experts of the chosen groups"]),
        ("partial_rotary_factor", 0.1, ["an even rotary dimension"]),
        ("partial_rotary_factor", 1.5, ["an even rotary dimension up to head_dim"]),
        ("partial_rotary_factor", 1e308, ["an even rotary dimension up to head_dim"]),
    ],
)
def test_configuration_of_another_model(field, value, parts, checkpoint_copy, edit_json):
    edit_json(checkpoint_copy / "config.json", lambda config: config | {field: value})
    refused(checkpoint_copy, "backbone: config.json", *parts)


def test_no_field_is_hard_coded(golden_checkpoint):
    """Every field of our configuration is read from the file under its own name."""
    config = json.loads((golden_checkpoint / "config.json").read_text())
    for name in BackboneConfig.__dataclass_fields__:
        factor = 2 if name not in ("partial_rotary_factor", "image_token_offset", "topk_group") else 0.5
        value = type(config[name])(config[name] * factor)
        if name in ("num_key_value_heads", "n_group", "num_experts_per_tok"):
            assert getattr(BackboneConfig.from_dict(config), name) == config[name]
            continue
        assert getattr(BackboneConfig.from_dict(config | {name: value}), name) == value, name


def test_codebooks_of_different_sizes(checkpoint_copy, edit_json):
    """The golden quantizer has 256 codes; a configuration that leaves room for 255 image ids is another model's."""
    edit_json(checkpoint_copy / "config.json", lambda config: config | {"image_token_offset": 449})
    refused(checkpoint_copy, "image_tokenizer", "256 codes", "255 image codes of config.json", "different models")


# Tokenizer


@pytest.mark.parametrize("token", ["<|mask|>", "<boi>", "<|/image|>", "<role>", "<|reserved_token_0|>"])
def test_tokenizer_without_a_special_token(token, checkpoint_copy, edit_json):
    def drop(tokenizer):
        tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != token]
        tokenizer["model"]["vocab"].pop(token, None)
        return tokenizer

    edit_json(checkpoint_copy / "tokenizer.json", drop)
    refused(checkpoint_copy, "tokenizer.json", f"no token {token}", "every special token", "Download")


def test_tokenizer_that_reaches_into_the_image_ids(checkpoint_copy, edit_json, rewrite):
    edit_json(checkpoint_copy / "config.json", lambda config: config | {"image_token_offset": 300})
    refused(checkpoint_copy, "tokenizer.json", "id 392", "text ids below 300", "different models")


def test_unreadable_tokenizer(checkpoint_copy):
    (checkpoint_copy / "tokenizer.json").write_text('{"model": 3}')
    refused(checkpoint_copy, "tokenizer.json", "unreadable", "a tokenizer", "Download")


# The pickled file


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickle_that_holds_more_than_tensors_is_never_executed(checkpoint_copy):
    path, trace = checkpoint_copy / "image_tokenizer" / "sigvq_embedding.pt", checkpoint_copy / "executed"
    torch.save({"prior_token_embedding.weight": torch.zeros(2, 2), "bomb": Bomb(trace)}, path)
    refused(checkpoint_copy, "image_tokenizer: sigvq_embedding.pt", "tensors alone", "Do not use this file")
    assert not trace.exists()
    path.write_bytes(pickle.dumps(Bomb(trace)))
    refused(checkpoint_copy, "sigvq_embedding.pt", "tensors alone")
    assert not trace.exists()


@pytest.mark.parametrize("value", [torch.zeros(3), [torch.zeros(3)], {"a": 1}, {"a": torch.zeros(2)}])
def test_pickle_of_something_else(value, checkpoint_copy):
    torch.save(value, checkpoint_copy / "image_tokenizer" / "sigvq_embedding.pt")
    refused(checkpoint_copy, "image_tokenizer: sigvq_embedding.pt", "expected")


def test_truncated_pickle(checkpoint_copy):
    path = checkpoint_copy / "image_tokenizer" / "sigvq_embedding.pt"
    assert zipfile.is_zipfile(path)
    path.write_bytes(path.read_bytes()[:-200])
    refused(checkpoint_copy, "image_tokenizer: sigvq_embedding.pt", "expected")


# Errors lose nothing


def test_a_repaired_checkpoint_opens_and_an_open_one_survives_later_damage(checkpoint_copy, model):
    shard = checkpoint_copy / SHARD
    data = shard.read_bytes()
    shard.write_bytes(data[:1000])
    refused(checkpoint_copy, SHARD)
    shard.write_bytes(data)
    opened = LLaDAUni(checkpoint_copy)
    shard.unlink()  # gone between opening and loading
    with pytest.raises((CheckpointError, FileNotFoundError)):
        opened.generate("fox", 64, 64)
    shard.write_bytes(data)
    drawn = opened.generate("fox", 64, 64, sampling=Sampling(steps=2)).tokens
    assert isinstance(drawn, ImageTokens)
    assert torch.equal(drawn.grids[0], model.generate("fox", 64, 64, sampling=Sampling(steps=2)).tokens.grids[0])


def test_errors_are_value_errors():
    """A caller that catches ValueError, as a host does, sees them all."""
    assert issubclass(CheckpointError, InputError)
    assert issubclass(InputError, ValueError)


def test_shards_hold_what_the_tests_above_change(golden_checkpoint):
    assert DENSE in load_file(golden_checkpoint / SHARD)
