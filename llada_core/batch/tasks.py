"""A batch through the engine. Where a batch fails, its requests are run one by one, and the wrong one is found."""

import io
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ..engine import Generation, LLaDAUni
from ..errors import InputError
from ..image_tokens import ImageTokens, join
from .requests import TOKEN_FILE, Request, read_picture
from .rows import Result, Work

log = logging.getLogger(__name__)


def run(model: LLaDAUni, works: Sequence[Work], worker: str = "") -> list[Result]:
    """Results of requests of one kind and shape, in their order; an error of one is that one's alone.

    Raises:
        RuntimeError: the device itself has failed, and nothing more can be computed by this process.
    """
    began = time.perf_counter()
    try:
        results = _together(model, works)
    except Exception as error:
        _check_device(model, error)
        if len(works) == 1:
            results = [_failed(works[0], error)]
        else:
            log.warning("%d requests together: %s; now one by one", len(works), error)
            return [result for work in works for result in run(model, [work], worker)]
    seconds = (time.perf_counter() - began) / len(works)
    return [replace(result, seconds=round(seconds, 3), worker=worker) for result in results]


def parts_for(requests: Iterable[Request]) -> tuple[str, ...]:
    """The parts of a checkpoint that requests need."""
    wanted: dict[str, None] = {}
    for request in requests:
        if request.kind != "decode":
            wanted["backbone"] = None
        if any(not path.name.endswith(TOKEN_FILE) for path in request.images):
            wanted["image_tokenizer"] = None
        if request.decoding is not None:
            wanted |= dict.fromkeys(("sigvq", "decoder-turbo" if request.decoding.turbo else "decoder", "vae"))
    return tuple(wanted)


def _together(model: LLaDAUni, works: Sequence[Work]) -> list[Result]:
    kind = works[0].request.kind
    images = _images(model, works, "understand" if kind == "ask" else "edit")
    if kind == "ask":
        return _answers(model, works, images)
    if kind == "decode":
        found = [Result(work.request.id, kind) for work in works]
        drawn = [tokens for tokens in images if tokens is not None]
    else:
        generations = _generations(model, works, images)
        found = [
            Result(work.request.id, kind, thinking=made.thinking or None, tokens=made.tokens, usage=made.usage)
            for work, made in zip(works, generations, strict=True)
        ]
        drawn = [made.tokens for made in generations]
    pictures = _pictures(model, works, drawn)
    return [replace(result, picture=picture) for result, picture in zip(found, pictures, strict=True)]


def _generations(model: LLaDAUni, works: Sequence[Work], references: Sequence[ImageTokens | None]) -> list[Generation]:
    alike = works[0].request  # its size and options are those of all
    return model.generate(
        [work.request.text for work in works],
        *(alike.size or (1024, 1024)),
        references=[one for one in references if one is not None] or None,
        thinking=alike.kind == "think",
        sampling=alike.sampling,
        guidance=alike.guidance,
        sprint=alike.sprint,
        seed=[work.request.seed for work in works],
    )


def _answers(model: LLaDAUni, works: Sequence[Work], images: Sequence[ImageTokens | None]) -> list[Result]:
    alike = works[0].request
    answers = model.answer(
        [work.request.text for work in works],
        [one for one in images if one is not None] or None,
        max_new_tokens=alike.max_new_tokens,
        sampling=alike.sampling,
        sprint=alike.sprint,
        seed=[work.request.seed for work in works],
    )
    return [
        Result(work.request.id, alike.kind, answer=answer.text, usage=answer.usage)
        for work, answer in zip(works, answers, strict=True)
    ]


def _pictures(model: LLaDAUni, works: Sequence[Work], drawn: Sequence[ImageTokens]) -> list[bytes]:
    """The requests' tokens as PNG files, all through the decoder and then the VAE; empty where tokens are enough."""
    decodings = [decoding for work in works if (decoding := work.request.decoding) is not None]
    if not decodings:  # they are alike but for their seeds
        return [b""] * len(works)
    return [_png(pixels) for pixels in model.decode(join(drawn), decodings[0], seed=[one.seed for one in decodings])]


def _png(pixels: torch.Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray((pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy()).save(file, "PNG")
    return file.getvalue()


def _images(model: LLaDAUni, works: Sequence[Work], purpose: str) -> list[ImageTokens | None]:
    """The images of each request in a row, or None where it has none. Each is sized as if it were alone."""
    sources = [source for work in works for source in work.sources]
    pictures = [_opened(source) for source in sources if not isinstance(source, ImageTokens)]
    encoded = iter(model.encode(pictures, purpose=purpose) if pictures else ())
    tokens = iter([source if isinstance(source, ImageTokens) else next(encoded) for source in sources])
    return [join(list(islice(tokens, len(work.sources)))) if work.sources else None for work in works]


def _opened(source: Path | bytes) -> torch.Tensor:
    """A picture as the engine takes it: float32 [1, height, width, 3 or 4] in 0...1."""
    file, name = (source, source.name) if isinstance(source, Path) else (io.BytesIO(source), "a picture")
    return torch.from_numpy(read_picture(file, name, _pixels))[None]


def _pixels(picture: Image.Image) -> np.ndarray:
    """float32 [height, width, 3 or 4] in 0...1, upright."""
    if picture.mode[0] in "IF":
        remedy = "Save it with 8 bits a channel."
        raise InputError("image", f"a picture of mode {picture.mode}", "8 bits a channel", remedy)
    upright = ImageOps.exif_transpose(picture)
    clear = "A" in upright.getbands() or "transparency" in upright.info
    return np.asarray(upright.convert("RGBA" if clear else "RGB"), dtype=np.float32) / 255


def _failed(work: Work, error: Exception) -> Result:
    """What a request's error says in the results file."""
    known = isinstance(error, InputError)
    text = str(error) if known else f"{type(error).__name__}: {str(error).strip() or 'no reason given'}"
    log.warning("request %s: %s", work.request.id, text, exc_info=None if known else error)
    return Result(work.request.id, work.request.kind, error=text)


def _check_device(model: LLaDAUni, error: Exception) -> None:
    """Raise RuntimeError where the GPU computes nothing any more, as after an illegal access.

    Every later call of the process fails then, so that its error is no request's own.
    """
    device = getattr(model.manager, "device", torch.device("cpu"))
    if device.type == "cuda" and not isinstance(error, InputError):
        try:
            torch.cuda.synchronize(device)
            torch.zeros(1, device=device)
        except torch.OutOfMemoryError:
            return
        except RuntimeError as broken:
            raise RuntimeError(f"{device} has failed: {broken}") from error
