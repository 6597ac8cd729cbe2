"""Decoding pictures larger than the decoders were trained on: said once, and done all the same."""

import logging

import torch

from llada_core.engine import LLaDAUni
from llada_core.image_tokens import ImageTokens
from llada_core.options import Decoding


def test_larger_pictures_than_trained_are_warned_of_once(checkpoint_copy, edit_json, caplog):
    """The trained size is that of the checkpoint's own edit budget: here 32 x 32 pixels, 4 tokens."""
    preprocessor = checkpoint_copy / "image_tokenizer" / "preprocessor_config.json"
    edit_json(preprocessor, lambda config: config | {"pixel_budgets": {"edit": 32 * 32}})
    model = LLaDAUni(checkpoint_copy)
    decoding = Decoding(steps=1)

    def decode(h: int, w: int) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            model.decode(ImageTokens((torch.zeros(h, w, dtype=torch.int64),), model.codebook_size), decoding)
        return [record.getMessage() for record in caplog.records if "trained" in record.getMessage()]

    assert decode(2, 2) == []
    assert len(decode(2, 3)) == 1
    assert decode(3, 3) == []  # once is enough
