"""For the campaign: a node whose output fits every socket, and a request that tells what memory is in use."""

import ctypes
import gc
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import torch
from aiohttp import web
from server import PromptServer


@PromptServer.instance.routes.post("/hostile/held")
async def held(request):
    """Collect, return the heap's free pages to the system, and say how many bytes of it are in use (glibc)."""
    gc.collect()
    library = ctypes.CDLL(None)
    library.malloc_trim(0)
    library.fopen.restype = ctypes.c_void_p
    with tempfile.NamedTemporaryFile() as told:
        file = ctypes.c_void_p(library.fopen(told.name.encode(), b"w"))
        library.malloc_info(0, file)
        library.fclose(file)
        text = Path(told.name).read_text()
    # After its heaps the whole: what it has of the system, what of that is free, and blocks of their own.
    whole = ElementTree.fromstring(text[: text.index("<heap")] + text[text.rindex("</heap>") + len("</heap>") :])
    sizes = {part.get("type"): int(part.get("size", 0)) for part in whole}
    return web.json_response({"held": sizes["current"] - sizes["fast"] - sizes["rest"] + sizes["mmap"]})


class HostileAnything:
    """Gives a value of a kind."""

    RETURN_TYPES = ("*",)
    FUNCTION = "give"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        """The host reads this."""
        return {"required": {"kind": ("STRING", {"default": "text"})}}

    def give(self, kind: str) -> tuple:
        """The value."""
        values = {
            "text": "a text",
            "number": 3,
            "nothing": None,
            "list": [1, 2, 3],
            "nan": float("nan"),
            "tensor": torch.zeros(1, 8, 8, 3),
            "huge tensor": torch.zeros(1).expand(1, 100_000, 100_000, 3),
            "empty tensor": torch.zeros(0, 0),
            "dictionary": {"samples": torch.zeros(1, 4, 8, 8)},
            "object": object(),
            "mask": torch.ones(1, 8, 8),
            "nan mask": torch.full((1, 8, 8), float("nan")),
            "flag mask": torch.ones(8, 8, dtype=torch.bool),
            "mask of 4": torch.ones(1, 1, 8, 8),
            "huge mask": torch.ones(1).expand(1, 100_000, 100_000),
            "empty mask": torch.ones(1, 0, 8),
            "sparse": torch.ones(1, 8, 8).to_sparse(),
            "meta": torch.ones(1, 8, 8, 3, device="meta"),
            "complex": torch.ones(1, 8, 8, 3, dtype=torch.complex64),
            "half": torch.ones(1, 8, 8, 3, dtype=torch.float16),
            "one pixel": torch.ones(1, 1, 1, 3),
            "no pixel": torch.ones(1, 0, 0, 3),
            "five": torch.ones(1, 1, 8, 8, 3),
            "bytes": torch.ones(1, 8, 8, 3, dtype=torch.uint8),
            "huge batch": torch.ones(1).expand(10**9, 8, 8, 3),
            "wide": torch.ones(1, 1, 4000, 3),
            "nan image": torch.full((1, 8, 8, 3), float("nan")),
            "alpha": torch.ones(3, 8, 8, 4),
            "long list": [0] * 100_000,
        }
        return (values[kind],)


NODE_CLASS_MAPPINGS = {"HostileAnything": HostileAnything}
