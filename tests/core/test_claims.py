"""Files that claim more than they hold: refused when opened, before anything is built or read in their proportion."""

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from llada_core.checkpoint.bounds import LIMITS, PICKLE_BYTES
from llada_core.engine import LLaDAUni
from llada_core.errors import CheckpointError, InputError
from llada_core.image_tokens import load_tokens

EMBEDDING = Path("image_tokenizer") / "sigvq_embedding.pt"
NAMES = {
    "prior_token_embedding.weight": (256, 16),
    "prior_projector.net.0.proj.weight": (16, 16),
    "prior_projector.net.0.proj.bias": (16,),
    "prior_projector.net.2.weight": (48, 16),
    "prior_projector.net.2.bias": (48,),
}


def refused(folder, *parts: str) -> None:
    """Opening ends in a CheckpointError of a screen's length that says all `parts`."""
    with pytest.raises(CheckpointError) as caught:
        LLaDAUni(folder)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert len(message) < 900


# Tensors without the numbers that they claim


def test_a_stride_of_0_makes_no_large_tensor(checkpoint_copy):
    wide = torch.zeros(1).expand(256, 2**22)
    tensors = {name: torch.zeros(shape) for name, shape in NAMES.items()}
    torch.save(tensors | {"prior_token_embedding.weight": wide}, checkpoint_copy / EMBEDDING)
    assert (checkpoint_copy / EMBEDDING).stat().st_size < 30_000
    refused(checkpoint_copy, EMBEDDING.name, "claim 4294", "Do not use this file")


def test_many_tensors_cannot_share_their_numbers(checkpoint_copy):
    """Each is within the file, together they are not."""
    shared = torch.zeros(48 * 256)
    tensors = {name: shared[: torch.Size(shape).numel()].view(shape) for name, shape in NAMES.items()}
    tensors |= {f"more{i}": shared for i in range(4)}
    torch.save(tensors, checkpoint_copy / EMBEDDING)
    refused(checkpoint_copy, EMBEDDING.name, "claim", "the file has")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.sparse_coo_tensor(torch.tensor([[0], [0]]), torch.ones(1), (2**20, 2**20), check_invariants=True),
        torch.empty(2**20, 2**20, device="meta"),
    ],
    ids=["sparse", "meta"],
)
def test_tensors_of_other_kinds(tensor, checkpoint_copy):
    torch.save({"prior_token_embedding.weight": tensor}, checkpoint_copy / EMBEDDING)
    refused(checkpoint_copy, EMBEDDING.name, "expected a dictionary of tensors")


class Room:
    """Unpickling this makes a byte array of a terabyte."""

    def __reduce__(self):
        return bytearray, (2**40,)


def with_pickle(path: Path, make, how: int = zipfile.ZIP_STORED) -> None:
    """Give an archive of tensors another pickle: make(the old one)."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            is_pickle = name.endswith("data.pkl")
            archive.writestr(name, make(data) if is_pickle else data, how if is_pickle else zipfile.ZIP_STORED)


def test_an_archive_that_asks_for_a_terabyte(checkpoint_copy):
    with_pickle(checkpoint_copy / EMBEDDING, lambda _: pickle.dumps({"a": Room()}, 2))
    refused(checkpoint_copy, EMBEDDING.name, "it names __builtin__ bytearray")


def test_an_archive_of_compressed_zeros(checkpoint_copy):
    with_pickle(checkpoint_copy / EMBEDDING, lambda _: bytes(2**26), zipfile.ZIP_DEFLATED)
    refused(checkpoint_copy, EMBEDDING.name, "is compressed")


def test_an_archive_with_a_large_pickle(checkpoint_copy):
    with_pickle(checkpoint_copy / EMBEDDING, lambda data: data + b"0" * PICKLE_BYTES)
    refused(checkpoint_copy, EMBEDDING.name, "no data.pkl of names and shapes")


@pytest.mark.parametrize(
    "header",
    [
        {"0": {"dtype": "I64", "shape": [2**40, 2], "data_offsets": [0, 32]}},
        {"0": {"dtype": "I64", "shape": [2, 2], "data_offsets": [0, 2**40]}},
        {"0": {"dtype": "I64", "shape": [2**63, 2**63], "data_offsets": [0, 32]}},
        {
            "0": {"dtype": "I64", "shape": [2, 2], "data_offsets": [0, 32]},
            "1": {"dtype": "I64", "shape": [2, 2], "data_offsets": [0, 32]},
        },
        {"0": {"dtype": "I64", "shape": [2, 2], "data_offsets": [8, 40]}},
        {"0": {"dtype": "I64", "shape": [-2, -2], "data_offsets": [0, 32]}},
    ],
    ids=["shape", "offsets", "overflow", "overlap", "gap", "negative"],
)
def test_headers_that_lie(header, tmp_path):
    """The library refuses them; this engine relies on it."""
    text = json.dumps({"__metadata__": {"codebook_size": "256"}} | header).encode()
    (tmp_path / "t.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(32))
    with pytest.raises(InputError, match=r"t\.safetensors: found an unreadable file"):
        load_tokens(tmp_path / "t.safetensors")


def test_a_codebook_of_five_thousand_digits(tmp_path):
    text = json.dumps(
        {
            "__metadata__": {"codebook_size": "1" * 5000},
            "0": {"dtype": "I64", "shape": [2, 2], "data_offsets": [0, 32]},
        }
    ).encode()
    (tmp_path / "t.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(32))
    with pytest.raises(InputError, match=r"codebook_size '1+\.\.\.1+'; expected") as caught:
        load_tokens(tmp_path / "t.safetensors")
    assert len(str(caught.value)) < 400


# Configurations

CONFIGS = {
    "config.json": ("backbone", lambda config: config),
    "image_tokenizer/config.json": ("image_tokenizer", lambda config: config["vision_config"]),
    "decoder/config.json": ("decoder", lambda config: config),
    "vae/config.json": ("vae", lambda config: config),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_no_configuration_claims_an_absurd_size(name, checkpoint_copy):
    """Every size that the four hold, one after the other: in a list, each of its values."""
    part, of = CONFIGS[name]
    path = checkpoint_copy / name
    text = path.read_text()
    sized = [field for field in of(json.loads(text)) if field in LIMITS]
    assert len(sized) >= 4
    for field in sized:
        for value in (LIMITS[field] + 1, 10**9, 2**40, 10**400):
            config = json.loads(text)
            old = of(config)[field]
            of(config)[field] = [value] * len(old) if isinstance(old, list) else value
            path.write_text(json.dumps(config))
            refused(checkpoint_copy, f"{part}: config.json", field, "at most")


@pytest.mark.parametrize(
    ("field", "value"), [("num_hidden_layers", 2000), ("num_experts", 10**9), ("vocab_size", 2**40)]
)
def test_the_backbone_is_not_built_to_find_out(field, value, checkpoint_copy, edit_json, monkeypatch):
    monkeypatch.setattr("llada_core.engine.open_backbone", lambda *_: pytest.fail("it was built"))
    edit_json(checkpoint_copy / "config.json", lambda config: config | {field: value})
    refused(checkpoint_copy, "backbone: config.json", f"{field} = {value}")


@pytest.mark.parametrize("field", ["num_hidden_layers", "num_experts", "hidden_size", "vocab_size"])
def test_sizes_within_the_limits_are_compared_with_the_headers(field, checkpoint_copy, edit_json):
    """Nothing but the files' own tensors makes a claim true."""
    edit_json(checkpoint_copy / "config.json", lambda config: config | {field: LIMITS[field]})
    refused(checkpoint_copy, "backbone" if field != "vocab_size" else "")


def test_long_lists_in_a_configuration(checkpoint_copy, edit_json):
    edit_json(checkpoint_copy / "decoder" / "config.json", lambda config: config | {"axes_dims": [1] * 10_000})
    refused(checkpoint_copy, "decoder: config.json", "10000 values of axes_dims")


@pytest.mark.parametrize("name", [*CONFIGS, "image_tokenizer/preprocessor_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5 + "1" + "}" * 10**5, '{"a": ' + "9" * 5000 + "}"])
def test_absurd_json(name, text, checkpoint_copy):
    (checkpoint_copy / name).write_text(text)
    refused(checkpoint_copy, Path(name).name, "expected a JSON object")


def test_json_of_gigabytes(checkpoint_copy):
    for name in ("config.json", "tokenizer.json"):
        with (checkpoint_copy / name).open("r+b") as file:
            before = file.read()
            file.truncate(2**32)  # a hole: it takes no room on the disk
        refused(checkpoint_copy, name, "4294967296 bytes", "at most")
        (checkpoint_copy / name).write_bytes(before)


@pytest.mark.parametrize("place", ["model", "pre_tokenizer", "normalizer", "added_tokens", "post_processor"])
def test_a_deep_tokenizer(place, checkpoint_copy, edit_json):
    path = checkpoint_copy / "tokenizer.json"
    edit_json(path, lambda tokenizer: tokenizer | {place: "@"})
    path.write_text(path.read_text().replace('"@"', "[" * 10**5 + "]" * 10**5))
    refused(checkpoint_copy, "tokenizer.json", "unreadable")
