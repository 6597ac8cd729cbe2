"""Damaged files: cut, with flipped bits, lying headers, other types, links and folders in their place.

Each is opened in a child process whose memory is limited to what it has and a little more: an allocation out of
proportion, a crash or an error that nobody made ends there and is reported with the damage that led to it.
"""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from dev.hosts.base_folder import CHECKPOINT, ROOT
from tests.hostile.parts import Report, Say

ROOM = 2**30  # bytes that the child may take beyond what it has when the checkpoint is loaded: 6 MB of files
CASE_SECONDS = 60
WORK_EVERY = 8  # damaged checkpoints that still open between two that are also asked for a picture
TOKENS = "tokens.safetensors"

TEXTS = ["", "x" * 5000, "9" * 5000, "\0", "..", "/etc/passwd", "../outside.safetensors", "NaN", "\ud83d\ude00"]
NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    2**15,
    2**31,
    2**40,
    2**63,
    2**64,
    10**9,
    10**30,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
]


def files(folder: Path) -> list[str]:
    """Every file of a checkpoint, and the token file, by its path in the folder."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in found if Path(name).suffix in (".json", ".safetensors", ".pt"))


def damage(random: Random, path: Path) -> str:
    """Damage the file at `path`, another place of the tree included; returns what was done."""
    ways = [cut, flip, flip, stuff, splice, replace_file]
    if path.suffix == ".json":
        ways += [json_value] * 8
    elif path.suffix == ".safetensors":
        ways += [header] * 10
    elif path.suffix == ".pt":
        ways += [pickled] * 8
    return random.choice(ways)(random, path)


def cut(random: Random, path: Path) -> str:
    """Keep some of the file: often hardly any, or all but a little."""
    data = path.read_bytes()
    keep = random.choice((0, 1, 7, 8, 9, len(data) - 1, len(data) // 2, random.randrange(len(data) + 1)))
    path.write_bytes(data[:keep])
    return f"cut to {keep} of {len(data)} bytes"


def flip(random: Random, path: Path) -> str:
    """Change some bits, mostly near the beginning, where headers are."""
    data = bytearray(path.read_bytes())
    places = []
    for _ in range(random.choice((1, 1, 2, 8, 64))):
        place = random.randrange(min(len(data), random.choice((16, 256, 4096, len(data)))))
        data[place] ^= 1 << random.randrange(8)
        places.append(place)
    path.write_bytes(bytes(data))
    return f"bits flipped in bytes {places[:6]}"


def stuff(random: Random, path: Path) -> str:
    """Put bytes in: zeros, ones, random ones, or the file itself once more."""
    data = path.read_bytes()
    at = random.choice((0, 8, len(data), random.randrange(len(data) + 1)))
    more = random.choice((bytes(random.choice((1, 8, 4096))), b"\xff" * 64, random.randbytes(64), data[:100_000]))
    path.write_bytes(data[:at] + more + data[at:])
    return f"{len(more)} bytes put in at {at}"


def splice(random: Random, path: Path) -> str:
    """Overwrite a stretch with a stretch from elsewhere in the file."""
    data = bytearray(path.read_bytes())
    size = random.randrange(1, min(len(data), 4096) + 1)
    source, target = random.randrange(len(data) - size + 1), random.randrange(len(data) - size + 1)
    data[target : target + size] = data[source : source + size]
    path.write_bytes(bytes(data))
    return f"{size} bytes from {source} written to {target}"


def replace_file(random: Random, path: Path) -> str:
    """Something else in the file's place."""
    other = random.choice(sorted(p for p in path.parent.rglob("*") if p.is_file() and p != path) or [path])
    way = random.choice(
        ("folder", "circle", "gone", "device", "pipe", "another file", "a link to another", "page", "hole")
    )
    path.unlink()
    if way == "folder":
        path.mkdir()
    elif way == "circle":
        path.symlink_to(path)
    elif way == "device":
        path.symlink_to(random.choice(("/dev/zero", "/dev/null", "/dev/full", "/proc/self/mem", "/")))
    elif way == "pipe":
        os.mkfifo(path)
    elif way == "another file":
        shutil.copy(other, path) if other.exists() else path.touch()
    elif way == "a link to another":
        path.symlink_to(other)
    elif way == "page":
        path.write_text("<!DOCTYPE html><html><body>404</body></html>")
    elif way == "hole":
        with path.open("wb") as file:
            file.write(random.choice((b"", b"{", struct.pack("<Q", 64), b"PK\x03\x04")))
            file.truncate(random.choice((2**20, 2**33, 2**40)))
    return f"{way} in its place"


def json_value(random: Random, path: Path) -> str:
    """Change, drop or nest a value somewhere in a JSON file."""
    value = json.loads(path.read_text())
    holder, key, name = value, None, "the whole"
    for _ in range(random.choice((1, 1, 2, 3, 4, 6))):
        keys = (
            list(holder) if isinstance(holder, dict) else list(range(len(holder))) if isinstance(holder, list) else []
        )
        if not keys:
            break
        if key is not None and not isinstance(holder[random.choice(keys)], (dict, list)) and random.random() < 0.5:
            break
        key = random.choice(keys)
        name = f"{key!r:.40}"
        if not isinstance(holder[key], (dict, list)):
            break
        if random.random() < 0.3:
            break
        parent, holder = holder, holder[key]
        if not holder:
            holder = parent
            break
    if key is None or not isinstance(holder, (dict, list)) or (isinstance(holder, dict) and key not in holder):
        holder = value
        key = random.choice(list(holder))
    if isinstance(holder, list) and (not isinstance(key, int) or key >= len(holder)):
        key = 0
    depth = random.choice((100, 10_000, 100_000))
    new = random.choice((*NUMBERS, *TEXTS, None, True, [], {}, [[]], "deep", "drop", "many", "digits"))
    if new == "drop":
        del holder[key]
    elif new == "many":
        holder[key] = [random.choice(NUMBERS)] * 10_000
    else:
        holder[key] = "@deep@" if new == "deep" else "@digits@" if new == "digits" else new
    text = json.dumps(value).replace('"@deep@"', "[" * depth + "]" * depth).replace('"@digits@"', "7" * 5000)
    path.write_text(text)
    return f"{name} = {new!r:.40}"


def header(random: Random, path: Path) -> str:
    """Make the header of a safetensors file lie, its length kept right."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    key = random.choice([name for name in entries if name != "__metadata__"])
    entry = entries[key]
    begin, end = entry["data_offsets"]
    huge = random.choice((2**31, 2**40, 2**62, 2**63, 2**64 - 1, 2**64))
    way = random.choice(
        (
            "shape",
            "flat",
            "dtype",
            "offsets",
            "overlap",
            "rename",
            "drop",
            "again",
            "metadata",
            "entry",
            "numel",
            "zero",
        )
    )
    if way == "shape":
        entry["shape"] = random.choice(
            ([huge], [huge, huge], [-1], [0], [], [1] * 1000, entry["shape"][::-1], "x", [0.5])
        )
    elif way == "flat":
        entry["shape"] = [max(1, torch_free_numel(entry["shape"])), 1]
    elif way == "dtype":
        entry["dtype"] = random.choice(
            ("F64", "F16", "BF16", "I8", "U8", "F8_E4M3", "F8_E5M2", "BOOL", "I64", "F4", "?", 3)
        )
    elif way == "offsets":
        entry["data_offsets"] = random.choice(
            (
                [begin, huge],
                [huge, huge],
                [end, begin],
                [begin + 1, end + 1],
                [begin, end - 1],
                [0, 0],
                [begin],
                None,
                [-8, 0],
            )
        )
    elif way == "overlap":
        other = random.choice([name for name in entries if name != "__metadata__"])
        entry["data_offsets"] = entries[other]["data_offsets"]
        entry["shape"] = entries[other]["shape"]
    elif way == "rename":
        entries[
            random.choice(("x", "", "model.layers.99999999999999999999.mlp.experts.1.up_proj.weight", "a" * 5000))
        ] = entries.pop(key)
    elif way == "drop":
        del entries[key]
    elif way == "again":
        entries[key + ".weight_scale"] = entry
    elif way == "metadata":
        entries["__metadata__"] = random.choice(
            (
                {"codebook_size": "9" * 5000},
                {"codebook_size": "0"},
                {"codebook_size": "-1"},
                {"codebook_size": 256},
                [],
                3,
            )
        )
    elif way == "entry":
        entries[key] = random.choice((None, 3, [], {}, "x", [entry]))
    elif way == "numel":
        entry["shape"] = [n * random.choice((1, 1, 2, 1000)) for n in entry["shape"]]
    elif way == "zero":
        entry["shape"], entry["data_offsets"] = [0, huge], [begin, begin]
    text = json.dumps(entries).encode()
    if random.random() < 0.1:
        text += b" " * random.choice((1, 7, 100_000))
    length = random.choice((len(text),) * 12 + (len(text) - 1, len(text) + 1, huge & (2**64 - 1), 0))
    path.write_bytes(struct.pack("<Q", length) + text + data[8 + size :])
    return f"header: {way} of {key:.60}"


def torch_free_numel(shape: list[int]) -> int:
    """The product of a shape."""
    product = 1
    for size in shape:
        product *= size
    return product


def pickled(random: Random, path: Path) -> str:
    """A `.pt` whose tensors are not what they say, written by torch itself."""
    import torch

    tensors: dict[Any, Any] = torch.load(path, weights_only=True)
    key = random.choice(sorted(tensors))
    tensor = tensors[key]
    huge = random.choice((2**20, 2**30, 2**40))
    made: dict[str, Callable[[], Any]] = {
        "expanded": lambda: tensor.reshape(-1)[:1].expand(huge, *tensor.shape[1:]),
        "strided": lambda: torch.as_strided(tensor, tensor.shape, [0] * tensor.ndim),
        "wide": lambda: torch.as_strided(tensor.reshape(-1), (tensor.numel() // 2, tensor.numel() // 2), (1, 1)),
        "half": lambda: tensor.half(),
        "double": lambda: tensor.double(),
        "whole": lambda: tensor.long(),
        "flag": lambda: tensor > 0,
        "complex": lambda: tensor.to(torch.complex64),
        "nan": lambda: tensor * float("nan"),
        "turned": lambda: tensor.T if tensor.ndim == 2 else tensor[None],
        "empty": lambda: tensor[:0],
        "part": lambda: tensor[: len(tensor) // 2],
        "meta": lambda: torch.empty(huge, 4, device="meta"),
        "sparse": lambda: tensor.to_sparse(),
        "list": lambda: [tensor],
        "text": lambda: "x" * 5000,
        "nothing": lambda: None,
        "parameter": lambda: torch.nn.Parameter(tensor),
    }
    way = random.choice(sorted(made))
    tensors[key] = made[way]()
    if random.random() < 0.1:
        tensors = random.choice(([tensors], {"state_dict": tensors}, list(tensors.values()), {3: tensor}, tensor))
    torch.save(tensors, path, _use_new_zipfile_serialization=random.random() > 0.05)
    return f"{way} {key}"


# The parent


def run_files(folder: Path, seed: int, count: int, say: Say) -> Report:
    """Damage `count` files one after the other, in as many child processes as it takes."""
    folder.mkdir(parents=True, exist_ok=True)
    report, done = Report("files"), 0
    log = folder / "log.jsonl"
    while done < count:
        log.write_text("")
        command = [sys.executable, "-m", "tests.hostile.child", str(folder), str(seed), str(done), str(count)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for line in lines:
            if line["kind"] == "begun":
                continue
            report.counts[line["kind"]] += 1
            if line["kind"] == "FAULT":
                report.faults.append(f"file {line['index']} ({line['what']}): {line['detail']}")
                say(report.faults[-1])
        begun = [line for line in lines if line["kind"] == "begun"]
        ended = {line["index"] for line in lines if line["kind"] != "begun"}
        if child.returncode and (not begun or begun[-1]["index"] in ended):
            raise RuntimeError(f"the child failed by itself:\n{child.stderr[-3000:]}")
        if begun and begun[-1]["index"] not in ended:
            how = signal.Signals(-child.returncode).name if child.returncode < 0 else f"status {child.returncode}"
            last = child.stderr.strip().splitlines()[-1:]
            report.fault(f"file {begun[-1]['index']} ({begun[-1]['what']}): ended the process, {how} {last}")
            say(report.faults[-1])
        done = begun[-1]["index"] + 1 if begun else count
        say(f"files: {done} of {count}, {dict(report.counts)}")
    shutil.rmtree(folder, ignore_errors=True)
    return report


def whole_folders() -> list[Path]:
    """Folders to be damaged, each with a token file: the checkpoint as released, and converted to 8 and 4 bits."""
    import torch

    from llada_core.conversion.convert import convert
    from llada_core.conversion.options import Conversion
    from llada_core.image_tokens import ImageTokens, save_tokens

    base = Path(tempfile.mkdtemp(prefix="damage-"))
    folders = [base / name / "checkpoint" for name in ("released", "int8", "int4")]
    shutil.copytree(CHECKPOINT, folders[0])
    for folder in folders[1:]:
        folder.parent.mkdir()
        # Links would lead the damage to the folder that was converted.
        convert(CHECKPOINT, folder, Conversion(folder.parent.name, vision="int8"), link=False)
    for folder in folders:
        save_tokens(ImageTokens(tuple(torch.full((2, 3), i) for i in range(3)), 256), folder / TOKENS)
    return folders
