"""What a checkpoint's small files may claim before anything is built from them.

A configuration costs a stranger nothing: ten bytes of it can ask for more modules, or a larger table, than a machine
holds. So its sizes have upper ends, far above all that is published and low enough that a module of that many layers
is laid out, without memory, in seconds. What is within them is compared with the shapes in the files' headers, which
`weights.plan` does for every tensor; and a tensor's shape with the bytes that its file has for it.
"""

import json
import math
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, shown

JSON_BYTES = 128 * 2**20  # the released tokenizer has 12 million, the index of 31,000 tensors 3
PICKLE_BYTES = 2**20  # of names and shapes; the released file has under a thousand
WHOLE_NUMBER = 2**53  # beyond, JSON numbers are no longer exact in most languages

_LAYERS = 256  # the deepest published language models have about 130
_WIDTH = 2**17  # the widest inner layers published have about 53,000
_HEADS = 1024

# Field of any configuration -> the largest value, of a number or of each in a list.
LIMITS = {
    "num_hidden_layers": _LAYERS,
    "first_k_dense_replace": _LAYERS,
    "depth": _LAYERS,
    "n_layers": _LAYERS,
    "n_refiner_layers": _LAYERS,
    "layers_per_block": 16,
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "moe_intermediate_size": _WIDTH,
    "dim": _WIDTH,
    "cap_feat_dim": _WIDTH,
    "embed_dim": _WIDTH,
    "latent_channels": _WIDTH,
    "block_out_channels": 2**14,
    "in_channels": 1024,
    "out_channels": 1024,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "num_heads": _HEADS,
    "n_heads": _HEADS,
    "n_kv_heads": _HEADS,
    "head_dim": 4096,
    "axes_dims": 1024,  # a rotary table of 32,768 rows is computed for each
    "num_experts": 4096,  # the most published are 512
    "num_shared_experts": 64,
    "num_embeddings": 2**20,  # codes; the released have 2**14
    "vocab_size": 2**22,  # the largest published have about 2**18
    "max_position_embeddings": 2**22,
    "image_size": 2**14,  # pixels each way of the table of positions
    "sample_size": 2**14,
}
# Fields that a library takes as they come, and that nothing looks at before the first picture.
NUMBERS = {
    "rope_theta",
    "t_scale",
    "norm_eps",
    "layer_norm_eps",
    "rms_norm_eps",
    "attention_dropout",
    "scaling_factor",
    "shift_factor",
}
FLAGS = {
    "qk_norm",
    "attention_bias",
    "force_upcast",
    "mid_block_add_attention",
    "use_quant_conv",
    "use_post_quant_conv",
}
TEXTS = {"act_fn", "hidden_act"}
LIST_LENGTH = 64  # of lists in a configuration: blocks of a VAE, channels, axes

# All that torch.save names for a dictionary of tensors.
_PICKLED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
_STORAGES = {f"torch {kind}Storage" for kind in ("BFloat16", "Double", "Float", "Half")}


def check_json_size(label: str, path: Path) -> None:
    """Raise CheckpointError where a JSON file is larger than any of a checkpoint."""
    size = path.stat().st_size
    if size > JSON_BYTES:
        remedy = "This is no file of this model; download it again."
        raise CheckpointError(f"{label}: {path.name}", f"{size} bytes", f"at most {JSON_BYTES}", remedy)


def check_sizes(label: str, name: str, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a field of a JSON object claims a size beyond LIMITS, or is no exact number."""
    for field, value in _numbers(config):
        most = LIMITS.get(field, WHOLE_NUMBER)
        if isinstance(value, int) and abs(value) > most:
            remedy = "No model has such sizes. Download the file again from the model's own page."
            raise CheckpointError(f"{label}: {name}", f"{field} = {shown(value)}", f"at most {most}", remedy)
    for field, value in _fields(config):
        wanted = next((kind for names, kind in _KINDS if field in names), None)
        if wanted and value is not None and not _is(value, wanted):
            raise CheckpointError(f"{label}: {name}", f"{field} = {shown(value)}", wanted, "Download the file again.")
        if field in LIMITS and isinstance(value, (list, dict)) and len(value) > LIST_LENGTH:
            found = f"{len(value)} values of {field}"
            raise CheckpointError(f"{label}: {name}", found, f"at most {LIST_LENGTH}", "Download the file again.")


_KINDS = ((NUMBERS, "a finite number"), (FLAGS, "true or false"), (TEXTS, "a name"))


def _is(value: Any, wanted: str) -> bool:
    if wanted == "a finite number":
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, bool if wanted == "true or false" else str)


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """Every field of a JSON object and of the objects in it."""
    for name, part in value.items():
        yield name, part
        if isinstance(part, dict):
            yield from _fields(part)


def _numbers(value: Any, field: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number of a JSON value with the name of the field that it, or the list it is in, belongs to."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _numbers(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from _numbers(part, field)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield field, value


def check_archive(path: Path) -> None:
    """Raise ValueError unless a `.pt` file is what torch.save makes of tensors alone.

    torch's own loader for weights executes nothing, but it unpacks whatever is packed, and makes byte arrays of any
    length that a file asks for.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError("no archive of torch.save")
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"{entry.filename} is compressed")
        pickles = [entry for entry in archive.infolist() if entry.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1 or pickles[0].file_size > PICKLE_BYTES:
            raise ValueError("no data.pkl of names and shapes")
        named = {
            argument if opcode.name == "GLOBAL" else opcode.name
            for opcode, argument, _ in pickletools.genops(archive.read(pickles[0]))
            if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")
        }
    foreign = sorted(str(name) for name in named - _PICKLED - _STORAGES)
    if foreign:
        raise ValueError(f"it names {foreign[0]}")


def check_held(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise ValueError where tensors claim more numbers than their file has bytes for, or are no plain ones.

    A stride of 0 makes a tensor of any size out of one number.
    """
    claimed = 0
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError(f"{name} is no plain tensor")
        claimed += tensor.nbytes
    size = path.stat().st_size
    if claimed > size:
        raise ValueError(f"its tensors claim {claimed} bytes, the file has {size}")


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for whatever is none, nested too deeply included."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
