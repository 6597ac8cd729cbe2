"""The estimate of working memory against what a generation really allocates: a host makes that much room for it."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from llada_core.options import Guidance, Sampling, Sprint
from llada_core.quantization.grouped import WORKING_BYTES
from llada_core.sampling.block_diffusion import GenerationConfig
from llada_core.sampling.working_bytes import working_bytes

WIDE = {"hidden_size": 256, "moe_intermediate_size": 64, "intermediate_size": 640, "head_dim": 32}
WORDY = {"vocab_size": 20_000}
PRUNING = Sprint(text_keep_ratio=0.5, image_keep_ratio=0.5)


def most_allocated(work) -> int:
    """Bytes of the CPU allocator at the highest point of `work`, above where it began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("sizes", "lengths", "count", "block", "sprint"),
    [
        (WORDY, [100], 64, 32, None),
        (WORDY, [100, 80, 50], 64, 32, None),
        (WIDE, [40, 30], 600, 32, None),  # most of it is masks, which pass block by block
        (WORDY, [200, 80], 200, 128, None),  # larger blocks hold more logits
        (WORDY, [300, 80], 64, 32, PRUNING),  # and so does scoring
        (WIDE, [1100, 1000], 64, 32, None),  # a prompt's activations and masks
        (WIDE | {"num_experts_per_tok": 4}, [2000], 64, 32, PRUNING),
    ],
)
def test_estimate_covers_what_is_allocated(sizes, lengths, count, block, sprint, oracle, generate_one):
    backbone = oracle.tiny_backbone(0, **sizes)
    prompts = [[i % 90 for i in range(length)] for length in lengths]

    def work():
        sampling, guidance = Sampling(block_length=block), Guidance(2.0, 1.0)
        config = GenerationConfig(2, 96, backbone.config.vocab_size, frozenset(), sampling, guidance, sprint)
        generate_one(backbone, prompts, count, config)

    estimate = working_bytes(
        backbone.config,
        len(prompts),
        max(lengths) + count,
        torch.float32,
        block,
        sprint=sprint is not None,
        given=max(lengths),
    )
    used = most_allocated(work)
    assert used > 1e6, "nothing was measured"
    assert used <= estimate <= 5 * used + WORKING_BYTES  # the latter is of devices other than a CPU
