"""How much the exact prefix cache saves: the engine against the form that recomputes everything in every round.

Both run the same random mixture of experts (512 wide, 8 layers, 64 experts of which 8 are active) in float32, draw
1,024 image tokens with guidance (two rows, prompts of about 100 tokens), 8 rounds a block of 32, and must agree on
every token. The recomputing form is that of the tests (tests/core/oracle.py). It computes with the engine's own
layers, but no block that nobody may see yet. Expected: the cache is at least 8 times as fast.

    python -m benchmarks.backbone [--tokens 1024] [--device cuda] [--sample 3] [--json FILE]

The recomputing form takes several minutes on two cores. Set OMP_NUM_THREADS to the cores that are really free; where
other programs run, the ratio by processor time is the steadier one. `--sample N` times only N blocks of it, from the
first to the last, and takes the rest from the line through their times; tokens are not compared then.
"""

import argparse
import itertools
import time

import torch

from llada_core.backbone.config import BackboneConfig
from llada_core.backbone.model import Backbone
from llada_core.options import Guidance, Sampling
from llada_core.sampling.batch import Sample
from llada_core.sampling.block_diffusion import GenerationConfig, Output, generate, prepare

from .support import add_json, load_oracle, show

CONFIG = BackboneConfig(
    vocab_size=2048 + 4096,
    image_token_offset=2048,
    hidden_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=1280,
    moe_intermediate_size=128,
    num_experts=64,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    rope_theta=600_000,
    max_position_embeddings=8192,
)
MASK = 2047
LENGTHS = (103, 97)  # of the conditional prompt and its twin
SAMPLING, GUIDANCE = Sampling(), Guidance(2.0)
ROUNDS = 8


class Clock:
    """Seconds that passed, and seconds of processor that this program took, until the device had finished."""

    def __init__(self, device: torch.device):
        self.device = device
        self.began = self._now()

    def _now(self) -> torch.Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)

    def read(self) -> torch.Tensor:
        """float64 [2], since this clock was made."""
        return self._now() - self.began


def recompute(
    oracle, backbone: Backbone, prompts, new: list[int], config: GenerationConfig, sample: int
) -> tuple[torch.Tensor, list[int] | None]:
    """Times of the recomputing form as `Clock` reads them, and its tokens where every block was run."""
    device = backbone.lm_head.weight.device
    slow = oracle.Oracle(oracle.recomputing(backbone), backbone, MASK, look_ahead=False)
    first = max(map(len, prompts)) // SAMPLING.block_length
    blocks = -(-(max(map(len, prompts)) + len(new)) // SAMPLING.block_length) - first
    if not sample:
        clock = Clock(device)
        ids = slow.generate(prompts, new, config).ids
        return clock.read(), ids
    chosen = sorted({round(i * (blocks - 1) / (sample - 1)) for i in range(sample)})
    seconds = []
    for block in chosen:
        clock = Clock(device)
        slow.generate(prompts, new, config, only_blocks=lambda index, block=block: index == block)
        seconds.append(clock.read())
        print(f"  block {block + 1} of {blocks}: {seconds[-1][0]:.1f} s", flush=True)
    pairs = list(zip(chosen, seconds, strict=True))
    total = torch.zeros(2, dtype=torch.float64)
    for (i, before), (j, after) in itertools.pairwise(pairs):
        total += (before + after) / 2 * (j - i)
    return total + (seconds[0] + seconds[-1]) / 2, None


@torch.no_grad()
def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="image tokens to draw")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="recompute only N blocks, at least 2")
    add_json(parser)
    arguments = parser.parse_args()
    oracle = load_oracle()
    backbone = oracle.randomise(Backbone(CONFIG), torch.Generator().manual_seed(0), 0.05).to(arguments.device)
    prompts = [[(7 * i + row) % MASK for i in range(length)] for row, length in enumerate(LENGTHS)]
    config = GenerationConfig(
        ROUNDS, CONFIG.image_token_offset, CONFIG.vocab_size, sampling=SAMPLING, guidance=GUIDANCE
    )

    def cached(count: int) -> tuple[torch.Tensor, Output]:
        sample = Sample(prompts, [MASK] * count)
        prepared = prepare(backbone, [sample], config, MASK, arguments.device)
        clock = Clock(backbone.lm_head.weight.device)
        (output,) = generate(*prepared, config)
        return clock.read(), output

    count = arguments.tokens
    cached(min(count, 64))  # warm-up
    before, output = cached(count)
    slow, ids = recompute(oracle, backbone, prompts, [MASK] * count, config, arguments.sample)
    after, _ = cached(count)  # once more, in case other programs came or went meanwhile
    fast = (before + after) / 2
    figures = {
        "tokens": count,
        "rounds": output.rounds,
        "recomputing, s": slow[0].item(),
        "recomputing measured on": f"{arguments.sample} blocks" if arguments.sample else "all blocks",
        "with the prefix cache, s": fast[0].item(),
        "times as fast": (slow[0] / fast[0]).item(),
        "times as fast, by processor time": (slow[1] / fast[1]).item(),
        "equal tokens": "not compared" if ids is None else f"{sum(map(int.__eq__, ids, output.ids))} of {count}",
    }
    show(f"Backbone, {arguments.device}, float32", figures, arguments.json)


if __name__ == "__main__":
    main()
