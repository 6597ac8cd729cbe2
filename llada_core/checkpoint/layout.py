"""What lies where in a checkpoint folder, and what is missing (docs/model.md, Files)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .weights import TensorFiles, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DOWNLOAD_COMMAND = "hf download inclusionAI/LLaDA2.0-Uni --local-dir <the checkpoint's folder>"

# A converted folder's config.json says so under this key; what each layer is stored as, its file says beside it.
QUANTIZATION = "llada_uni_quantization"
QUANTIZATION_VERSION = 1
NAME_BYTES = 255  # of a file's name, on every system in use

# Part -> the files that make it up; of a tuple, any one. Everything else a checkpoint may lack and still open.
_PARTS: dict[str, list[str | tuple[str, ...]]] = {
    "image_tokenizer": [
        "image_tokenizer/config.json",
        "image_tokenizer/preprocessor_config.json",
        "image_tokenizer/image_tokenizer.safetensors",
    ],
    "sigvq": ["image_tokenizer/sigvq_embedding.pt"],
    "decoder": ["decoder/config.json", ("decoder/decoder_model.safetensors", "decoder/model.safetensors")],
    "decoder-turbo": [
        "decoder-turbo/config.json",
        ("decoder-turbo/decoder_model.safetensors", "decoder-turbo/model.safetensors"),
    ],
    "vae": ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"],
}


@dataclass(frozen=True)
class Layout:
    """A checkpoint folder.

    Attributes:
        root: the folder.
        missing: part -> the files it lacks, for parts that are not complete.
    """

    root: Path
    missing: dict[str, list[str]]

    @classmethod
    def open(cls, root: Path) -> "Layout":
        """Look at a folder.

        Raises CheckpointError where the backbone or its tokenizer is not there, or where a conversion of another
        version wrote it.
        """
        root = Path(root)
        for name in ("config.json", "tokenizer.json"):
            if not (root / name).is_file():
                remedy = f"Download the checkpoint: {DOWNLOAD_COMMAND}"
                raise CheckpointError("checkpoint", f"no {name} in {root.name}", "a LLaDA2.0-Uni folder", remedy)
        check_quantization(read_json("backbone", root / "config.json"))
        return cls.look(root)

    @classmethod
    def look(cls, root: Path) -> "Layout":
        """Which parts are in a folder, whatever else is."""
        missing = {}
        for part, files in _PARTS.items():
            absent = [names for names in files if not any((root / n).is_file() for n in _options(names))]
            if absent:
                missing[part] = [_options(names)[0] for names in absent]
        return cls(root, missing)

    def require(self, part: str) -> Path:
        """The folder of a part. Raises CheckpointError that names the files it lacks."""
        if part in self.missing:
            absent = ", ".join(self.missing[part])
            remedy = f"This checkpoint has only some parts; complete it: {DOWNLOAD_COMMAND}"
            raise CheckpointError(f"checkpoint {self.root.name}", f"no {absent}", f"the files of its {part}", remedy)
        return self.root / Path(_options(_PARTS[part][0])[0]).parent

    def has(self, part: str) -> bool:
        """Whether all files of a part are there."""
        return part not in self.missing

    def part_files(self, part: str) -> list[Path]:
        """The files of a part that is there, relative to the folder: of several names for one, that which is there."""
        chosen = [[name for name in _options(names) if (self.root / name).is_file()] for names in _PARTS[part]]
        return [Path(names[0]) for names in chosen]

    @staticmethod
    def files(root: Path) -> list[Path]:
        """The files that make up the checkpoint in a folder, those that are there, sorted.

        Nothing else in the folder changes what is read from it. An index that cannot be read names no shards; `open`
        and `backbone_files` say what is wrong with it.
        """
        names = ["config.json", "tokenizer.json", INDEX, SINGLE]
        names += [name for files in _PARTS.values() for options in files for name in _options(options)]
        try:
            listed = read_json("backbone", root / INDEX).get("weight_map")
        except CheckpointError:
            listed = None
        if isinstance(listed, dict):
            names += [name for name in listed.values() if isinstance(name, str) and _is_file_name(name)]
        return sorted(path for path in {root / name for name in names} if path.is_file())

    def backbone_files(self) -> TensorFiles:
        """The backbone's shards, from the index or the single file. Raises CheckpointError where one is missing."""
        index = self.root / INDEX
        if index.is_file():
            listed = read_json("backbone", index).get("weight_map")
            if not isinstance(listed, dict) or not listed or not all(isinstance(n, str) for n in listed.values()):
                raise CheckpointError(f"backbone: {INDEX}", "no weight_map", "tensor -> file", "Download it again.")
            names = sorted(set(listed.values()))
            outside = [name for name in names if not _is_file_name(name)]
            if outside:
                remedy = "Do not use this checkpoint: its index names what can be no file of its own folder."
                raise CheckpointError(f"backbone: {INDEX}", repr(outside[0]), "file names of this folder", remedy)
            return TensorFiles("backbone", [self.root / name for name in names], listed)
        return TensorFiles("backbone", [self.root / SINGLE])


def check_quantization(config: Mapping[str, object]) -> None:
    """Raise CheckpointError where config.json says that its folder was converted in a way that is not known here."""
    if QUANTIZATION not in config:
        return
    found = config[QUANTIZATION]
    version = found.get("version") if isinstance(found, dict) else None
    if version != QUANTIZATION_VERSION:
        label, what = "checkpoint: config.json", f"{QUANTIZATION} of version {version!r}"
        remedy = "Update this pack, or convert the released checkpoint again with this one."
        raise CheckpointError(label, what, f"version {QUANTIZATION_VERSION}", remedy)


def _is_file_name(name: str) -> bool:
    """Whether a file in a folder can have this name; systems answer longer ones with an error, not with "no"."""
    return Path(name).name == name and len(name.encode("utf-8", "replace")) <= NAME_BYTES


def _options(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names
