"""A node whose output fits every socket, for the campaign's base folder: what a careless pack hands on."""

import torch


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
        }
        return (values[kind],)


NODE_CLASS_MAPPINGS = {"HostileAnything": HostileAnything}
