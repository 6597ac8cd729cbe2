"""How many passes a batch takes, against the least there can be and against going from block to block together.

A small random backbone on the CPU; what is counted depends on no machine. *Alone, most* is of the sample that takes
most passes by itself: no batch takes fewer. *In step* is what a batch takes where every sample waits until all have
filled their block. Tokens are checked to be those of each sample alone.

    python -m benchmarks.passes [--count 16] [--json FILE]
"""

import argparse

import torch

from llada_core.options import Guidance, Sampling
from llada_core.sampling.batch import Sample
from llada_core.sampling.block_diffusion import GenerationConfig, Output, generate, prepare

from .support import add_json, load_oracle, show

MASK, IMAGES, VOCABULARY = 95, 96, 160  # of the small backbone


class Passes:
    """Counts over one backbone.

    Args:
        backbone: a small one.
    """

    def __init__(self, backbone):
        self.backbone = backbone

    def fill(self, samples: list[Sample], config: GenerationConfig) -> tuple[list[Output], list[tuple[int, int]]]:
        """What samples side by side give, and (block, rounds done in it) after each pass."""
        seen: list[tuple[int, int]] = []
        runner, batch = prepare(self.backbone, samples, config, MASK)
        return generate(runner, batch, config, lambda *at: seen.append(at)), seen

    def count(self, samples: list[Sample], config: GenerationConfig) -> dict[str, int]:
        """The figures of a batch."""
        together, passes = self.fill(samples, config)
        in_step: dict[int, int] = {}
        most = 0
        for sample, output in zip(samples, together, strict=True):
            (alone,), seen = self.fill([sample], config)
            if alone.ids != output.ids:
                raise RuntimeError("a sample of a batch is not what it is alone")
            most = max(most, len(seen))
            for block, done in seen:
                in_step[block] = max(in_step.get(block, 0), done)
        return {"passes": len(passes), "alone, most": most, "in step": sum(in_step.values())}


def ids(seed: int, count: int) -> list[int]:
    """Random ids that are not the mask."""
    found = torch.randint(0, VOCABULARY - 1, (count,), generator=torch.Generator().manual_seed(seed))
    return (found + (found >= MASK)).tolist()


def workloads(count: int) -> dict[str, tuple[list[Sample], GenerationConfig]]:
    """Batches by name: texts that are never sure, and texts and pictures that are so at times."""
    chance = torch.Generator().manual_seed(0)
    prompts, lengths = (torch.randint(*bounds, (count,), generator=chance).tolist() for bounds in ((20, 300), (8, 200)))
    unsure = GenerationConfig(32, IMAGES, VOCABULARY, sampling=Sampling(threshold=1.0))
    sure = GenerationConfig(32, IMAGES, VOCABULARY, sampling=Sampling(threshold=0.5))
    drawn = GenerationConfig(8, IMAGES, VOCABULARY, sampling=Sampling(threshold=0.5), guidance=Guidance())
    return {
        f"{count} texts of 64 tokens, prompts one longer than another, never sure": (
            [Sample([ids(at, 54 + at)], [MASK] * 64) for at in range(count)],
            unsure,
        ),
        f"{count} texts of 8 to 200 tokens, sure of some": (
            [Sample([ids(at, prompts[at])], [MASK] * lengths[at]) for at in range(count)],
            sure,
        ),
        f"{count} pictures of 256 tokens, sure of some": (
            [Sample([ids(at, 40 + 7 * at), ids(99 + at, 30)], [MASK] * 256) for at in range(count)],
            drawn,
        ),
    }


@torch.no_grad()
def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=16, help="samples of a batch")
    add_json(parser)
    options = parser.parse_args()
    passes = Passes(load_oracle().tiny_backbone(1))
    figures: dict[str, object] = {}
    for name, work in workloads(options.count).items():
        figures |= {f"{name}: {key}": value for key, value in passes.count(*work).items()}
    show("Passes of a batch", figures, options.json)


if __name__ == "__main__":
    main()
