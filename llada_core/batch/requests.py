"""What a line of the requests' file may ask for, checked without a model. A wrong line is an error of its own."""

import hashlib
import json
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from ..checks import MAX_SEED, check_choice, check_count, check_kind, check_size, check_text
from ..errors import InputError, shown
from ..image_tokens import ImageTokens, load_tokens
from ..options import EDIT_GUIDANCE, MAX_NEW_TOKENS, Decoding, Guidance, Sampling, Sprint

TOKEN_FILE = ".safetensors"  # how a file of image tokens ends; every other file is a picture
MAX_REFERENCES = 64  # of one request
MAX_LINE = 4_000_000  # characters: a prompt of the greatest length, every character written as an escape
_ID = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?")
_DRAWING = ("prompt", "height", "width", "seed", "sampling", "guidance", "sprint", "decoding")
FIELDS = {  # kind -> what a request of it may have besides id and kind
    "draw": _DRAWING,
    "think": _DRAWING,
    "edit": ("prompt", "images", "seed", "sampling", "guidance", "sprint", "decoding"),
    "ask": ("question", "images", "seed", "max_new_tokens", "sampling", "sprint"),
    "decode": ("tokens", "seed", "decoding"),
}
NEEDED = {"draw": ("prompt",), "think": ("prompt",), "edit": ("prompt", "images"), "ask": ("question",)} | {
    "decode": ("tokens",)
}
Options = TypeVar("Options", Sampling, Guidance, Sprint, Decoding)


@dataclass(frozen=True)
class Request:
    """One thing that is asked for.

    Attributes:
        id: names the files of its result.
        kind: "draw", "think", "edit", "ask" or "decode".
        raw: the line's fields as they were read; `parse` makes the same request of them anywhere.
        text: the prompt or the question, "" for decode.
        size: (height, width) of the picture in pixels, where the request says it.
        images: files of references, of pictures to ask about, or the one of tokens to decode.
        shapes: of each of those, what makes requests alike: its pixels, or its grids.
        seed: of the draws, and of the decoder's noise where `decoding` has none of its own.
        max_new_tokens: of an answer.
        sampling, guidance, sprint: None for the engine's defaults.
        decoding: None where only tokens are wanted.
    """

    id: str
    kind: str
    raw: Mapping[str, Any]
    text: str = ""
    size: tuple[int, int] | None = None
    images: tuple[Path, ...] = ()
    shapes: tuple[tuple, ...] = ()
    seed: int = 0
    max_new_tokens: int = 2048
    sampling: Sampling | None = None
    guidance: Guidance | None = None
    sprint: Sprint | None = None
    decoding: Decoding | None = None

    @property
    def digest(self) -> str:
        """Of the line's fields: whether a result is of this very request."""
        return hashlib.sha256(json.dumps(self.raw, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def shape(self) -> Hashable:
        """What requests of one batch have in common: all but words, seeds and what is in the pictures."""
        decoding = self.decoding and replace(self.decoding, seed=0)
        options = (self.sampling, self.guidance, self.sprint, decoding, self.max_new_tokens)
        return (self.kind, self.size, self.shapes, *options)


@dataclass(frozen=True)
class Wrong:
    """A line that is no request: its number from 1 up, the id and kind where it has them, and what is wrong."""

    line: int
    error: str
    id: str | None = None
    kind: str | None = None


@dataclass
class _Seen:
    """Ids so far, as file systems that do not tell capitals apart have them -> their lines."""

    lines: dict[str, int] = field(default_factory=dict)

    def take(self, request_id: str, line: int) -> None:
        first = self.lines.setdefault(request_id.casefold(), line)
        if first != line:
            found = f"{shown(request_id)}, which line {first} has (capitals do not count)"
            raise InputError("id", found, "an id of its own", "Ids name the files of results; choose another.")


def read_requests(path: Path) -> tuple[list[Request], list[Wrong]]:
    """Every line of a file of requests.

    Args:
        path: JSON Lines, UTF-8; empty lines are passed over. Files that requests name are relative to its folder.

    Returns:
        What can be done, and what is wrong, both in the file's order. Of two requests with one id the second is wrong.

    Raises:
        InputError: a file that cannot be read.
    """
    requests: list[Request] = []
    wrong: list[Wrong] = []
    seen = _Seen()
    try:
        with path.open(encoding="utf-8-sig", errors="strict") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                raw: dict[str, Any] = {}
                known = None
                try:
                    raw = _object(line)
                    known = _identity(raw)
                    seen.take(known, number)
                    requests.append(parse(raw, path.parent))
                except InputError as error:
                    own = known is not None and seen.lines.get(known.casefold()) == number
                    kind = raw.get("kind")
                    kind = kind if isinstance(kind, str) and kind in FIELDS else None
                    wrong.append(Wrong(number, str(error), known if own else None, kind))
    except (OSError, UnicodeDecodeError) as error:
        remedy = "Give a file with a JSON object on each line."
        raise InputError("requests", f"{path.name}, unreadable ({error})", "a text in UTF-8", remedy) from error
    return requests, wrong


def parse(raw: Mapping[str, Any], folder: Path | None) -> Request:
    """A request from the fields of its line.

    Args:
        raw: what JSON gives.
        folder: what the files it names are relative to, and must lie in. None where they are not looked for, because
            what is in them has come along: `images` and `shapes` stay empty then.

    Raises:
        InputError: a field that is unknown to the kind, missing, of another type or out of range; a file outside the
            folder, or none that can be read.
    """
    request_id, kind = _identity(raw), raw.get("kind")
    check_choice("kind", kind, tuple(FIELDS))  # type: ignore[arg-type]  # it checks the type as well
    assert isinstance(kind, str)
    unknown = sorted(set(raw) - {"id", "kind", *FIELDS[kind]})
    if unknown:
        expected = f"of {kind} nothing but id, kind, {', '.join(FIELDS[kind])}"
        raise InputError("request", f"the unknown field {shown(unknown[0])}", expected, "Remove it, or correct it.")
    missing = [name for name in NEEDED[kind] if name not in raw]
    if missing:
        raise InputError("request", f"no field {missing[0]}", f"{kind} with {missing[0]}", "Add it.")
    request = Request(request_id, kind, dict(raw), seed=raw.get("seed", 0))
    check_count("seed", request.seed, 0, MAX_SEED, "Seeds are whole numbers from 0 up.")
    for name in ("prompt", "question"):
        if name in raw:
            check_text(name, raw[name])
            request = replace(request, text=raw[name])
    if "height" in FIELDS[kind]:
        size = (raw.get("height", 1024), raw.get("width", 1024))
        check_size(*size)
        request = replace(request, size=size)
    if "max_new_tokens" in raw:
        check_count("max_new_tokens", raw["max_new_tokens"], 1, MAX_NEW_TOKENS, "2048 is the default.")
        request = replace(request, max_new_tokens=raw["max_new_tokens"])
    guidance = Guidance(text=EDIT_GUIDANCE) if kind == "edit" else Guidance()
    request = replace(
        request,
        sampling=_options("sampling", Sampling(), raw),
        guidance=_options("guidance", guidance, raw),
        sprint=_options("sprint", Sprint(), raw),
        decoding=_decoding(raw, request.seed) if "decoding" in FIELDS[kind] else None,
    )
    named = _names("tokens" if kind == "decode" else "images", raw, kind)
    if folder is None:
        return request
    images = tuple(inside(folder, name) for name in named)
    shapes = tuple(_shape(path, name) for path, name in zip(images, named, strict=True))
    if kind == "decode" and len(shapes[0]) != 2:
        found = f"{named[0]} with {len(shapes[0]) - 1} images"
        raise InputError("tokens", found, "a file of one image", "Save each image's tokens to a file of its own.")
    return replace(request, images=images, shapes=shapes)


def batches(requests: Iterable[Request], size: int, workers: int) -> list[list[Request]]:
    """Requests of one kind and shape together, in their order.

    Args:
        size: of a batch at most, from 1 up.
        workers: among how many a shape's requests are shared, so that a few do not all wait for one worker.
    """
    alike: dict[Hashable, list[Request]] = {}
    for request in requests:
        alike.setdefault(request.shape, []).append(request)
    found = []
    for group in alike.values():
        step = max(1, min(size, -(-len(group) // workers)))
        found += [group[start : start + step] for start in range(0, len(group), step)]
    return found


def inside(folder: Path, name: str) -> Path:
    """The file of that name in a folder, links followed. Raises InputError where it lies outside, or is no file."""
    remedy = "Put the file beside the requests, and name it relative to them."
    try:
        root, path = folder.resolve(), (folder / name).resolve()
        there = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError("file", f"{shown(name)} ({error})", "a file's name", remedy) from error
    if not path.is_relative_to(root):
        raise InputError("file", f"{shown(name)}, outside the requests' folder", "a file in that folder", remedy)
    if not there:
        raise InputError("file", f"{shown(name)}, which is not there", "a file in the requests' folder", remedy)
    return path


def _object(line: str) -> dict[str, Any]:
    """A line's JSON object. A name that stands twice is refused: JSON would take the last in silence."""
    remedy = "Write one JSON object a line."
    if len(line) > MAX_LINE:
        raise InputError("line", f"{len(line)} characters", f"at most {MAX_LINE}", "Shorten it.")

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in found]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError("line", f"{shown(twice)} twice", "each field once", remedy)
        return dict(found)

    try:
        value = json.loads(line, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("line", f"{shown(line.strip())} ({error})", "a JSON object", remedy) from error
    check_kind("line", value, dict, "a JSON object", remedy)
    return value


def _identity(raw: Mapping[str, Any]) -> str:
    """The id, which is a part of files' names on every system."""
    found = raw.get("id")
    if not isinstance(found, str) or not _ID.fullmatch(found):
        expected = "a text of 1 to 100 letters, digits, -, _ and dots that are neither first nor last"
        raise InputError("id", shown(found), expected, "Ids name the files of results; choose such a one.")
    return found


def _options(name: str, default: Options, raw: Mapping[str, Any]) -> Options | None:
    """Options over their defaults; None where the request has none, or null."""
    given = raw.get(name)
    if given is None:
        return None
    check_kind(name, given, dict, "an object of options", "Write {} for the defaults, or leave it out.")
    names = [entry.name for entry in fields(default)]
    unknown = sorted(set(given) - set(names))
    if unknown:
        expected = f"nothing but {', '.join(names)}"
        raise InputError(name, f"the unknown option {shown(unknown[0])}", expected, "Remove it, or correct it.")
    return replace(default, **given)


def _decoding(raw: Mapping[str, Any], seed: int) -> Decoding | None:
    """How the picture is made; null is the wish for tokens alone."""
    if "decoding" not in raw:
        return Decoding(seed=seed)
    if raw["decoding"] is None and raw["kind"] == "decode":
        raise InputError("decoding", "null", "options, or nothing", "To decode is all that this kind does.")
    return _options("decoding", Decoding(seed=seed), raw)


def _names(name: str, raw: Mapping[str, Any], kind: str) -> list[str]:
    """Names of files: a text, or a list of texts where there may be several."""
    given = raw.get(name, [])
    names = [given] if isinstance(given, str) else given
    remedy = "Name files relative to the requests' file."
    several = kind != "decode"
    expected = "a file's name" + (", or a list of some" if several else "")
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise InputError(name, shown(given), expected, remedy)
    if len(names) > (MAX_REFERENCES if several else 1) or (not names and name in raw):
        raise InputError(name, f"{len(names)} files", expected, remedy)
    if kind == "decode" and not names[0].endswith(TOKEN_FILE):
        raise InputError(name, shown(names[0]), f"a file of tokens, {TOKEN_FILE}", "Name a file of image tokens.")
    return names


def _shape(path: Path, name: str) -> tuple:
    """(codes, size, size...) of a token file, ("pixels", size) of a picture. Its header is read, not its pixels."""
    if path.name.endswith(TOKEN_FILE):
        tokens: ImageTokens = load_tokens(path)
        return (tokens.codebook_size, *tokens.sizes)
    return ("pixels", read_picture(path, name, lambda picture: picture.size))


Read = TypeVar("Read")


def read_picture(source: Any, name: str, read: Callable[[Image.Image], Read]) -> Read:
    """Open a picture and read something of it; whatever Pillow objects to becomes an InputError.

    Args:
        source: a path, or an open file.
        name: what errors call it.
    """
    try:
        with Image.open(source) as picture:
            return read(picture)
    except Exception as error:  # Pillow's formats share no class for "this file is damaged"
        found = f"{shown(name)}, unreadable ({type(error).__name__}: {error})"
        raise InputError("image", found, "a picture", "Save it again as PNG or JPEG.") from error
