"""How much memory a generation takes besides the weights."""

import torch

from ..backbone.config import BackboneConfig
from ..backbone.head import PART
from ..backbone.runner import SCORED, STORED, prefill_positions
from ..quantization.grouped import WORKING_BYTES
from .unmasker import LOGITS


def working_bytes(
    config: BackboneConfig,
    branches: int,
    length: int,
    dtype: torch.dtype,
    block_length: int = 32,
    *,
    sprint: bool = False,
    samples: int = 1,
    kept: bool = False,
    given: int | None = None,
) -> int:
    """Memory that a batch needs besides the weights: the cache, a prompt chunk's activations, rounds and their logits.

    Args:
        config: sizes.
        branches: of each sample.
        length: prompt and new tokens of the longest sample.
        dtype: of the activations.
        block_length: positions whose logits are guided and softmaxed together.
        sprint: the prefix is gathered into a copy, and finished positions are scored by their logits.
        samples: side by side.
        kept: caches of conditional branches are kept from one generation to the next.
        given: ids of the longest sample that are there from the start; all of them if it is None.
    """
    rows = branches * samples
    cached = length + block_length + -(length + block_length) % STORED
    of_row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * cached * dtype.itemsize
    cache = of_row * (rows * (2 if sprint else 1) + (samples if kept else 0))
    # What passes through a layer: the last part of a prompt goes along with the first round.
    run = min(length, prefill_positions(rows, block_length) + block_length)
    if given is not None:
        run = min(run, given + 2 * block_length)  # rows are padded to whole blocks
    pair = 2 * config.hidden_size + 3 * config.moe_intermediate_size
    token = 2 * config.num_experts_per_tok * pair + 6 * config.hidden_size + 3 * config.intermediate_size
    group = config.num_attention_heads // config.num_key_value_heads
    mask = length * (1 + group * (1 + dtype.itemsize))  # once more for each query of a key, and as numbers
    layer = max(rows * run * (dtype.itemsize * token + mask), WORKING_BYTES)
    graphs = rows * 2 * block_length * (dtype.itemsize * token + mask)
    # Logits of the branches as computed and in float32; three more of the guided ones.
    at_once = min(samples, max(LOGITS // (block_length * config.vocab_size), 1))
    logits = (2 * branches + 3) * at_once * block_length * config.vocab_size
    if sprint:
        logits = max(logits, 3 * max(SCORED, rows) * config.vocab_size)
    factor = (3 * config.hidden_size + 2 * PART) * config.hidden_size  # of the head
    return cache + layer + graphs + 4 * (logits + factor)
