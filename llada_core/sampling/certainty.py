"""How sure the model is of the tokens of a finished image (docs/model.md, Masked drawing)."""

from typing import cast

import torch

from ..backbone.runner import CachedRunner
from .batch import Batch
from .block_diffusion import GenerationConfig
from .unmasker import Unmasker


def certainty(runner: CachedRunner, batch: Batch, config: GenerationConfig) -> torch.Tensor:
    """The probability that the model gives each token where it is masked and every second one of its block is seen.

    A prediction means nothing where its token is seen, for the model was trained on masked ones alone. So every block
    is run twice, side by side, with another half of it masked each time, after all earlier blocks as they are.

    Args:
        runner, batch: of two samples with the same ids, all given.
        config: guidance and allowed ids.

    Returns:
        float32 [n], of each new id.
    """
    first, _ = batch.tracks
    given = torch.tensor(first.ids[first.begin : first.end])
    found = torch.zeros(len(given))
    unmasker = cast(Unmasker, runner.then)
    for start in batch.starts:
        at = torch.arange(start, start + batch.block_length)
        inside = (at >= first.begin) & (at < first.end)
        hidden_in = [inside & (at % 2 == parity) for parity in (0, 1)]
        hidden = torch.stack(hidden_in).to(batch.ids.device)
        window = batch.block(start).clone()
        batch.write(start, window.masked_fill(hidden, batch.mask_id))
        probabilities = unmasker.probabilities(runner.block(batch.rows, start)).cpu()
        batch.write(start, window)
        for sample, masked in enumerate(hidden_in):
            ids = given[at[masked] - first.begin] - config.low
            found[at[masked] - first.begin] = probabilities[sample, masked].gather(-1, ids[:, None])[:, 0]
    return found
