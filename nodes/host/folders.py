"""Where checkpoints and token files lie. Only what is listed here can be opened."""

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import folder_paths

from ...llada_core.checks import check_kind
from ...llada_core.engine import Layout
from ...llada_core.errors import InputError, shown

CHECKPOINTS = "llada_uni"
PARTIAL = ".partial"  # ends the name of a folder that a conversion is still writing
TOKEN_SUFFIX = ".safetensors"
_COUNTER = "_{:05}_" + TOKEN_SUFFIX
_OUTPUT = " [output]"  # the host's own way to mark files of its output folder

_OURS = Path(__file__).resolve().parents[2] / "checkpoints"  # the miniature comes with the pack

folder_paths.add_model_folder_path(CHECKPOINTS, os.path.join(folder_paths.models_dir, CHECKPOINTS))
folder_paths.add_model_folder_path(CHECKPOINTS, str(_OURS))


def checkpoint_names() -> list[str]:
    """Every folder at any depth under the host's llada_uni folders that holds config.json and tokenizer.json.

    What comes with the pack is last: who has a checkpoint of their own wants that one.
    """
    found = _checkpoints()
    return sorted(found, key=lambda name: (_OURS in found[name].parents, name))


def checkpoint_path(name: str) -> Path:
    """The folder of a listed checkpoint. Raises InputError for any other name."""
    found = _checkpoints()
    if not isinstance(name, str) or name not in found:
        places = ", ".join(place for place in folder_paths.get_folder_paths(CHECKPOINTS) if Path(place) != _OURS)
        expected = f"one of {', '.join(checkpoint_names())}"
        raise InputError("checkpoint", shown(name), expected, f"Put the checkpoint's folder into {places}.")
    return found[name]


def _checkpoints() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for base in folder_paths.get_folder_paths(CHECKPOINTS):
        for path in _checkpoint_folders(Path(base)):
            relative = path.relative_to(base).as_posix()
            found.setdefault(path.name if relative == "." else relative, path)
    return found


def _checkpoint_folders(base: Path) -> Iterator[Path]:
    seen = set()  # links may lead in circles
    for root, folders, files in os.walk(base, followlinks=True):
        folders[:] = [name for name in folders if not name.endswith(PARTIAL)]
        real = os.path.realpath(root)
        if real in seen or {"config.json", "tokenizer.json"} <= set(files):
            folders.clear()
        if real not in seen and {"config.json", "tokenizer.json"} <= set(files):
            yield Path(root)
        seen.add(real)


def checkpoint_fingerprint(name: str) -> str:
    """A text that changes when a file that is part of a listed checkpoint is written anew, and else never."""
    return _fingerprint(Layout.files(checkpoint_path(name)))


def token_file_fingerprint(name: str | None) -> str:
    """A text that changes when a listed token file is written anew."""
    return _fingerprint([token_file(name)])


def _fingerprint(files: Iterable[Path]) -> str:
    return repr([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files])


def token_file_names() -> list[str]:
    """Token files of the input folder, then of the output folder, the latter marked as the host marks them."""
    return sorted(_token_files())


def token_file(name: str | None) -> Path:
    """The path of a listed token file. Raises InputError for any other name."""
    found = _token_files()
    if not isinstance(name, str) or name not in found:
        expected = "a .safetensors file of the input or output folder"
        raise InputError("file", shown(name), expected, "Save tokens first, or put the file into the input folder.")
    return found[name]


def _token_files() -> dict[str, Path]:
    places = (("", folder_paths.get_input_directory()), (_OUTPUT, folder_paths.get_output_directory()))
    return {
        path.relative_to(base).as_posix() + mark: path
        for mark, base in places
        for path in Path(base).rglob(f"*{TOKEN_SUFFIX}")
        if path.is_file()
    }


def check_token_prefix(prefix: str) -> None:
    """Raise InputError unless files whose names begin with `prefix` can be written; writes nothing.

    The file system itself is asked about each name, since what it refuses differs from one to the next.
    """
    remedy = 'Give a short name such as "tokens/llada"; a slash makes a folder inside the output folder.'

    def refuse(found: str) -> InputError:
        return InputError("filename_prefix", found, "the start of a file name", remedy)

    check_kind("filename_prefix", prefix, str, "the start of a file name", remedy)
    if any(ord(character) < 32 for character in prefix):
        raise refuse(f"{shown(prefix)}, with characters that no file name has")
    base = Path(folder_paths.get_output_directory()).absolute()
    target = Path(os.path.abspath(base / prefix))
    if not target.is_relative_to(base):
        raise refuse(f"{shown(prefix)}, which leaves the output folder")
    *folders, name = target.relative_to(base).parts or ("",)
    if not all(part.strip(". ") for part in (*folders, name)):
        raise refuse(f"{shown(prefix)}, a name without a letter")
    file = f"{name}{_COUNTER.format(10**5)}"
    within = [base.joinpath(*folders[:count]) for count in range(len(folders) + 1)]
    # Of a path the first part that is not there ends the search, so each name is also asked about alone.
    for path in (*within, within[-1] / file, *(base / part for part in (*folders, file))):
        try:
            str(path).encode()
            found = path.lstat() and path.stat()
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "half a character"
            raise refuse(f"{shown(prefix)}, which the file system refuses ({reason})") from error
        if path in within and not (stat.S_ISDIR(found.st_mode) and os.access(path, os.W_OK | os.X_OK)):
            raise refuse(f"{shown(prefix)}, where {path.name} is no folder that can be written to")


def next_token_file(prefix: str) -> tuple[Path, str]:
    """The next free path for a prefix in the output folder, and its name relative to that folder.

    Raises InputError as `check_token_prefix`.
    """
    check_token_prefix(prefix)
    base = folder_paths.get_output_directory()
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, base)
    file = f"{name}{_COUNTER.format(counter)}"
    return Path(folder) / file, (Path(subfolder) / file).as_posix()
