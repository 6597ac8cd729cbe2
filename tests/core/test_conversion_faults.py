"""Conversions that must not begin, that break off, and folders that are not what they say."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llada_core.checkpoint.layout import QUANTIZATION
from llada_core.conversion import convert as conversion
from llada_core.conversion import shards
from llada_core.conversion.command import main
from llada_core.conversion.convert import convert
from llada_core.conversion.options import Conversion
from llada_core.engine import LLaDAUni
from llada_core.errors import CheckpointError, InputError
from llada_core.quantization.formats import encode_metadata

ROOT = Path(__file__).parents[2]
QUICK = Conversion("int8", parts=("backbone",))
BANK = "model.layers.1.mlp.experts.gate_up"
NORM = "model.layers.1.input_layernorm"


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "new"


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# Targets


def test_target_that_is_the_source(checkpoint_copy, tmp_path):
    before = names(checkpoint_copy)
    link = tmp_path / "link"
    link.symlink_to(checkpoint_copy, target_is_directory=True)
    for target in (checkpoint_copy, link, checkpoint_copy / ".", tmp_path / "link" / ".." / "checkpoint"):
        with pytest.raises(InputError, match=r"target: found .*, which is the source; expected another folder"):
            convert(checkpoint_copy, target, QUICK)
        with pytest.raises(InputError, match="which is the source"):
            convert(link, target, QUICK)
    for target in (checkpoint_copy / "int8", link / "deep" / "int8"):
        with pytest.raises(InputError, match="inside the source"):
            convert(checkpoint_copy, target, QUICK)
    assert names(checkpoint_copy) == before


def test_target_that_is_there(golden_checkpoint, target):
    target.mkdir()
    (target / "picture.png").write_text("mine")
    with pytest.raises(InputError, match="which is there already"):
        convert(golden_checkpoint, target, QUICK)
    assert names(target) == {"picture.png"}
    (target / "picture.png").unlink()
    convert(golden_checkpoint, target, QUICK)
    assert "config.json" in names(target), "an empty folder is as good as none"


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_target_that_is_no_folder(kind, golden_checkpoint, target):
    if kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(target.parent / "nowhere")
    with pytest.raises(InputError, match="which is there already"):
        convert(golden_checkpoint, target, QUICK)


def test_remains_of_something_else(golden_checkpoint, target):
    work = target.with_name("new.partial")
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"new\.partial, which no conversion left"):
        convert(golden_checkpoint, target, QUICK)
    assert names(work) == {"notes.txt"}


# Sources


def test_source_that_is_no_checkpoint(tmp_path, target):
    with pytest.raises(CheckpointError, match=r"no config\.json in empty"):
        convert(tmp_path / "empty", target, QUICK)
    assert not os.path.lexists(target)
    assert not target.with_name("new.partial").exists()


def test_source_that_was_converted(golden_checkpoint, target, tmp_path):
    convert(golden_checkpoint, target, QUICK)
    with pytest.raises(CheckpointError, match="source: found new, which was converted already"):
        convert(target, tmp_path / "twice", QUICK)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != QUANTIZATION}))
    with pytest.raises(CheckpointError, match="backbone: found layers in int8; expected bf16 or FP8 weights"):
        convert(target, tmp_path / "twice", QUICK)


def test_source_with_a_number_that_is_not_finite(checkpoint_copy, rewrite, target):
    def spoil(tensors):
        tensors["model.layers.2.attention.dense.weight"][3, 4] = float("nan")
        return tensors

    rewrite(checkpoint_copy, spoil)
    with pytest.raises(InputError, match=r"model\.layers\.2\.attention\.dense\.weight: found 1 numbers that are NaN"):
        convert(checkpoint_copy, target, QUICK)
    assert not target.exists()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"backbone": "int2"}, "backbone: found 'int2'; expected one of int4, int4-128, int8, fp8, keep"),
        ({"decoder": "int4"}, "decoder: found 'int4'; expected one of int8, keep"),
        ({"parts": ("backbone", "tokenizer")}, "parts: found 'tokenizer'"),
        ({"parts": ("vae",)}, "parts: found vae; expected backbone among them"),
    ],
)
def test_choices_that_are_none(choices, message):
    with pytest.raises(InputError, match=message):
        Conversion(**choices)


# Broken off


@pytest.fixture
def counted(monkeypatch):
    """The names of the files that conversions begin to write, in order."""
    begun = []
    enter = shards.ShardWriter.__enter__
    monkeypatch.setattr(shards.ShardWriter, "__enter__", lambda self: (begun.append(self.path.name), enter(self))[1])
    return begun


def stop_in(shard_layer: int):
    def on_progress(share: float, what: str) -> None:
        if f"layers.{shard_layer}.mlp" in what:
            raise KeyboardInterrupt

    return on_progress


def test_resumed_where_it_was_stopped(golden_checkpoint, target, counted, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        convert(golden_checkpoint, target, QUICK, on_progress=stop_in(2))
    work = target.with_name("new.partial")
    assert not target.exists()
    left = names(work)
    assert "model-00002-of-00004.safetensors" in left
    assert not {"model-00003-of-00004.safetensors", "config.json"} & left
    assert not [name for name in left if name.endswith(".partial")]
    del counted[:]
    convert(golden_checkpoint, target, QUICK)
    assert counted == ["model-00003-of-00004.safetensors", "model-00004-of-00004.safetensors"]
    assert not work.exists()
    convert(golden_checkpoint, tmp_path / "at once", QUICK)
    for path in sorted(target.glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "at once" / path.name).read_bytes()
    cards = [(folder / "README.md").read_text() for folder in (target, tmp_path / "at once")]
    assert cards[0] == cards[1].replace("at once", "new"), "errors of what was written before are kept"


def test_a_shard_that_was_damaged_in_between_is_written_again(golden_checkpoint, target, counted):
    with pytest.raises(KeyboardInterrupt):
        convert(golden_checkpoint, target, QUICK, on_progress=stop_in(2))
    path = target.with_name("new.partial") / "model-00001-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    del counted[:]
    convert(golden_checkpoint, target, QUICK)
    assert counted[0] == "model-00001-of-00004.safetensors"


@pytest.mark.parametrize("change", ["choices", "source"])
def test_nothing_goes_on_with_another_conversions_remains(change, checkpoint_copy, target):
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint_copy, target, QUICK, on_progress=stop_in(2))
    if change == "source":
        os.utime(checkpoint_copy / "model-00001-of-00002.safetensors", (1, 1))
    other = Conversion("int4", parts=("backbone",)) if change == "choices" else QUICK
    with pytest.raises(InputError, match=r"new\.partial of a conversion with other choices, or of another source"):
        convert(checkpoint_copy, target, other)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_without_a_word(golden_checkpoint, target):
    """Nothing half-written has a final name, and the same command finishes the work."""
    program = f"""
import os, signal
from llada_core.conversion.convert import convert
from llada_core.conversion.options import Conversion
from llada_core.conversion import convert as conversion
from llada_core.conversion import shards

put = shards.ShardWriter.write
def write(self, key, tensor):
    if "00003" in self.path.name and "experts" in key:
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, key, tensor)
shards.ShardWriter.write = write
convert({str(golden_checkpoint)!r}, {str(target)!r}, Conversion("int8", parts=("backbone",)))
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    left = names(target.with_name("new.partial"))
    assert "model-00003-of-00004.safetensors.partial" in left
    assert not {"model-00003-of-00004.safetensors", "config.json"} & left
    convert(golden_checkpoint, target, QUICK)
    assert not [name for name in names(target) if name.endswith(".partial")]
    assert LLaDAUni(target).components["backbone"].load(torch.float32)


def full_after(monkeypatch, nbytes: int) -> None:
    """A disk that has room for so much more."""
    put, left = shards.ShardWriter._put, [nbytes]

    def put_if_room(self, offset, data):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, offset, data)

    monkeypatch.setattr(shards.ShardWriter, "_put", put_if_room)


def test_a_disk_that_fills_up(golden_checkpoint, target, monkeypatch):
    with monkeypatch.context() as patch:
        full_after(patch, 150_000)
        with pytest.raises(CheckpointError, match=r"target: found a full disk; expected room .*it goes on where it st"):
            convert(golden_checkpoint, target, QUICK)
    assert not target.exists()
    left = names(target.with_name("new.partial"))
    assert "model-00001-of-00004.safetensors" in left, "what was whole is kept"
    assert not [name for name in left if name.endswith(".partial")]
    convert(golden_checkpoint, target, QUICK)
    assert LLaDAUni(target)


def test_several_files_at_once_as_a_gpu_writes_them(golden_checkpoint, target, tmp_path, monkeypatch):
    """The same bytes and the same card; a full disk is told once, and what was whole is kept."""
    convert(golden_checkpoint, tmp_path / "in a row", QUICK)
    monkeypatch.setattr(conversion, "files_at_once", lambda device: 3)
    with monkeypatch.context() as patch:
        full_after(patch, 150_000)
        with pytest.raises(CheckpointError, match="found a full disk"):
            convert(golden_checkpoint, target, QUICK)
    assert not target.exists()
    assert not [name for name in names(target.with_name("new.partial")) if name.endswith(".partial")]
    with pytest.raises(KeyboardInterrupt):
        convert(golden_checkpoint, target, QUICK, on_progress=stop_in(2))
    convert(golden_checkpoint, target, QUICK)
    for path in sorted(target.glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "in a row" / path.name).read_bytes()
    cards = [(folder / "README.md").read_text() for folder in (target, tmp_path / "in a row")]
    assert cards[0] == cards[1].replace("in a row", "new")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("convert")]


def test_a_disk_that_is_too_small_from_the_start(golden_checkpoint, target, monkeypatch):
    small = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    with pytest.raises(CheckpointError, match=r"target: found 1e-06 GB free; expected 0\.000\d+ GB"):
        convert(golden_checkpoint, target, QUICK)
    assert not target.exists()


# Folders that are not what they say


@pytest.mark.parametrize("version", [2, "1", None])
def test_a_folder_of_another_version(version, golden_checkpoint, target, edit_json):
    convert(golden_checkpoint, target, QUICK)
    edit_json(target / "config.json", lambda config: config | {QUANTIZATION: {"version": version}})
    with pytest.raises(CheckpointError, match=f"{QUANTIZATION} of version {version!r}; expected version 1"):
        LLaDAUni(target)
    edit_json(target / "config.json", lambda config: config | {QUANTIZATION: version})
    with pytest.raises(CheckpointError, match="of version None; expected version 1"):
        LLaDAUni(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {f"{BANK}.comfy_quant": encode_metadata({"format": "nvfp4"})},
            rf"backbone: model-00002-of-00004\.safetensors: {BANK}.weight: found the format .*nvfp4",
        ),
        (
            lambda t: t | {f"{BANK}.comfy_quant": torch.tensor(list(b"{"), dtype=torch.uint8)},
            "found an unreadable comfy_quant",
        ),
        (
            lambda t: t | {f"{BANK}.comfy_quant": torch.zeros(100_000, dtype=torch.uint8)},
            r"comfy_quant: found metadata of shape \[100000\]",
        ),
        (
            lambda t: t | {f"{BANK}.weight_scale": t[f"{BANK}.weight_scale"][:-1]},
            r"gate_up\.weight: found weight_scale of shape \[7, 64, 1\].*expected weight_scale of shape \[8, 64, 1\]",
        ),
        (
            lambda t: t | {f"{BANK}.weight_scale": t[f"{BANK}.weight_scale"].half()},
            "found weight_scale of shape .*float16; expected .*float32",
        ),
        (
            lambda t: {key: value for key, value in t.items() if key != f"{BANK}.weight_scale"},
            r"gate_up\.weight: found no weight_scale",
        ),
        (
            lambda t: {key: value for key, value in t.items() if key != f"{BANK}.comfy_quant"},
            "gate_up.weight of type I8 alone; expected the comfy_quant that says",
        ),
        (
            lambda t: t | {f"{BANK}.weight_zeros": t[f"{BANK}.weight_scale"].clone()},
            rf"the unknown tensor {BANK}.weight_zeros",
        ),
        (
            lambda t: (
                t | {"model.layers.1.input_layernorm.comfy_quant": encode_metadata({"format": "int8_tensorwise"})}
            ),
            r"input_layernorm\.weight of shape \[64\] as int8",
        ),
    ],
)
def test_tensors_that_are_not_what_their_metadata_says(change, message, golden_checkpoint, target, edit_json):
    convert(golden_checkpoint, target, QUICK)
    path = target / "model-00002-of-00004.safetensors"
    tensors = change(load_file(path))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    edit_json(
        target / "model.safetensors.index.json",
        lambda index: {"weight_map": {k: f for k, f in index["weight_map"].items() if f != path.name or k in tensors}},
    )
    with pytest.raises(CheckpointError, match=message):
        LLaDAUni(target)


# The command


def test_the_command(golden_checkpoint, target, capsys):
    arguments = [str(golden_checkpoint), str(target), "--backbone", "int8", "--parts", "backbone", "--device", "cpu"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "README.md there has the details" in said.out
    assert [line.split(" %")[0].strip() for line in said.err.splitlines()][-1] == "100"
    assert main(arguments) == 1
    assert "which is there already" in capsys.readouterr().err
    assert main([str(target), str(target) + "2"]) == 1
    assert "converted already" in capsys.readouterr().err


def test_stopping_the_command(golden_checkpoint, target, monkeypatch, capsys):
    monkeypatch.setattr(shards.ShardWriter, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert main([str(golden_checkpoint), str(target), "--backbone", "int8"]) == 130
    assert "The same command goes on in new.partial" in capsys.readouterr().err
    assert not target.exists()
