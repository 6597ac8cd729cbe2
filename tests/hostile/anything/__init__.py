"""For the campaign's base folder: a node whose output fits every socket; and a request that has
the host give back memory that is free.
"""

import ctypes
import gc

import torch
from aiohttp import web
from server import PromptServer


@PromptServer.instance.routes.post("/hostile/trim")
async def trim(request):
    """Collect, and return the heap's free pages to the system.

    A heap keeps the pages between what lives. How many lie there is the allocator's luck, and grows slowly whatever is
    computed; what is held is the rest.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return web.Response()


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
