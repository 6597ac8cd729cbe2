"""Many at once: what batches of pictures and questions take on one GPU, against one, and one after the other.

The released backbone in bfloat16 with random weights, made on the card. They spread tokens over the experts as a
trained router does (`random_folder`); the experts that are hit are printed. Random weights are never sure, so every
block takes all its rounds, and text a token a round: the worst case. A picture is 1,024 tokens with guidance, 8 rounds
a block of 32; a question is about a picture of 2,500 tokens, its answer 64 tokens. Each batch is run twice, and times
are of the second run, as in a host that goes on drawing: graphs are there where they fit what is kept. Peaks are of the
first run, weights aside, graphs not counted. *Equal to alone*: whether the first picture of a batch has the tokens that
it has alone; products of other sizes are rounded otherwise in bfloat16, and random weights have nearly equal
predictions to exchange. Of the questions it also says what their time goes to (`phases`), and what encoding their
pictures takes besides; the tower of SigLIP-VQ has random weights too.

    python -m benchmarks.batches [--pictures 1 4 8 16] [--questions 16] [--weights 4-bit] [--json FILE]
    python -m benchmarks.batches --tiny          the same path on the CPU with small sizes, in seconds
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from llada_core.backbone.config import BackboneConfig
from llada_core.backbone.cuda_graphs import GraphStore
from llada_core.backbone.experts import MixtureOfExperts, Router
from llada_core.backbone.model import Backbone
from llada_core.options import WEIGHTS, Guidance
from llada_core.quantization.choices import asked_form
from llada_core.quantization.formats import Dense
from llada_core.quantization.modules import StoredWeight, apply_formats
from llada_core.sampling.batch import Sample
from llada_core.sampling.block_diffusion import GenerationConfig, Output, generate, prepare
from llada_core.sampling.working_bytes import working_bytes
from llada_core.vision.siglip_vq import build

from .phases import Phases, Watch
from .random_folder import LONG, SHORT, Vision, tokenizer_config
from .support import add_json, load_oracle, released_backbone, show, write_figures

GRID, SEEN, ANSWER = 32 * 32, 50 * 50, 64  # tokens of a picture drawn, of one asked about, of an answer
STEPS, TEXT_STEPS = 8, 32


def even_backbone(config: BackboneConfig, device: torch.device, dtype: torch.dtype, weights: str) -> Backbone:
    """A backbone with random weights that spread tokens over all experts, made where it lies.

    Args:
        weights: one of `options.WEIGHTS`; others than "as stored" are random weights, quantized.
    """
    form = asked_form(weights, "backbone")
    with torch.device("meta"):
        backbone = Backbone(config).to(dtype)
    if form is not None:
        apply_formats(backbone, lambda name, shape: form)
    backbone = backbone.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, layer in backbone.named_modules():
        if isinstance(layer, Router):
            layer.float()
        quantized = isinstance(layer, StoredWeight) and not isinstance(layer.form, Dense)
        if quantized:
            shape = layer.shape
            dense = torch.empty(shape, device=device, dtype=dtype).normal_(0, shape[-1] ** -0.5, generator=generator)
            for suffix, stored in layer.form.quantize(dense).items():
                getattr(layer, suffix).copy_(stored)
            continue
        for suffix, parameter in layer.state_dict(prefix=f"{name}.").items():
            if suffix.rpartition(".")[0] != name:
                continue  # of a layer inside
            if parameter.ndim == 1:
                long = name.endswith(("query_layernorm", "key_layernorm"))
                parameter.fill_(0.0 if suffix.endswith("bias") else LONG if long else 1.0)
            else:
                spread = SHORT if name == "word_embeddings" else parameter.shape[-1] ** -0.5
                parameter.normal_(0, spread, generator=generator)
    return backbone


class Bench:
    """Runs batches over one backbone and notes figures, which are written as they come.

    Args:
        backbone: with random weights.
        device, dtype: of it.
        file: where figures go too.
    """

    def __init__(self, backbone: Backbone, device: torch.device, dtype: torch.dtype, file: Path | None):
        self.backbone, self.device, self.dtype, self.file = backbone, device, dtype, file
        self.mask = backbone.config.image_token_offset - 1
        self.store = GraphStore()
        self.figures: dict[str, object] = {}

    def note(self, name: str, value: object) -> None:
        """Print a figure, and write all so far."""
        self.figures[name] = value
        show(f"{time.strftime('%H:%M:%S')} ", {name: value}, None)
        if self.file is not None:
            write_figures("So far", self.figures, self.file)

    def text(self, count: int, seed: int) -> list[int]:
        """Ids of a prompt, other ones for each seed."""
        return [(7 * i + 13 * seed) % self.mask for i in range(count)]

    def fill(
        self, samples: Sequence[Sample], config: GenerationConfig, phases: Phases | None = None
    ) -> tuple[list[Output], float, float]:
        """What samples side by side give, seconds, and the peak of memory above what lay there, in GB.

        phases: take what the time went to.
        """
        cuda = self.device.type == "cuda"
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        watch = Watch(self.backbone, phases or Phases())
        with watch.counting():
            runner, batch = prepare(
                self.backbone, samples, config, self.mask, self.device, self.dtype, store=self.store
            )
            watch.prepared()
            outputs = generate(runner, batch, config, watch.on_round)
            runner.finish()
        if cuda:
            torch.cuda.synchronize()
        watch.over()
        seconds = time.perf_counter() - began
        return outputs, seconds, (torch.cuda.max_memory_allocated() - before) / 1e9 if cuda else 0.0

    def asked(self, samples: Sequence[Sample], config: GenerationConfig) -> float:
        """Memory that such a batch asks for, GB."""
        prompt = max(max(map(len, sample.branches)) for sample in samples)
        length, rows, count = prompt + len(samples[0].new), len(samples[0].branches), len(samples)
        asked = working_bytes(self.backbone.config, rows, length, self.dtype, samples=count, given=prompt)
        return asked / 1e9

    def hits(self, tokens: int) -> float:
        """How many experts of a layer a block of each row hits in one pass, the mean over layers; rows of 32."""
        found: list[int] = []

        def look(module: MixtureOfExperts, args: tuple[torch.Tensor]) -> None:
            x = args[0][:, -32:].flatten(0, 1)
            found.append(len(module.gate(x)[0].unique()))

        layers = [part for part in self.backbone.modules() if isinstance(part, MixtureOfExperts)]
        hooks = [layer.register_forward_pre_hook(look) for layer in layers]
        samples = [
            Sample([self.text(90, 2 * at), self.text(60, 2 * at + 1)], [self.mask] * 6) for at in range(tokens // 64)
        ]
        config = GenerationConfig(1, self.mask + 1, self.backbone.config.vocab_size, guidance=Guidance(2.0))
        try:
            runner, batch = prepare(self.backbone, samples, config, self.mask, self.device, self.dtype)
            generate(runner, batch, config)
        finally:
            for hook in hooks:
                hook.remove()
        return sum(found) / len(found)

    def pictures(self, counts: Sequence[int], grid: int) -> None:
        """Batches of pictures with guidance."""
        config = GenerationConfig(STEPS, self.mask + 1, self.backbone.config.vocab_size, guidance=Guidance(2.0))
        made = [
            Sample([self.text(100, 2 * at), self.text(80, 2 * at + 1)], [self.mask] * grid) for at in range(max(counts))
        ]
        alone: list[Output] = []
        one = 0.0
        for count in counts:
            _, _, peak = self.fill(made[:count], config)
            outputs, seconds, _ = self.fill(made[:count], config)
            name = f"{count} picture{'s' * (count > 1)}"
            self.note(f"{name}, s", seconds)
            if count == 1:
                alone, one = outputs, seconds
                self.note("a round of one, ms", 1000 * seconds / outputs[0].rounds)
            else:
                self.note(f"{name}, times as long as one", seconds / one)
                self.note(f"{name}, equal to alone", "yes" if outputs[0].ids == alone[0].ids else "no")
            self.note(f"{name}, peak GB of {self.asked(made[:count], config):.2f} asked for", peak)

    def questions(self, count: int, seen: int, answer: int, name: str, longer: int) -> None:
        """Questions about a picture each, side by side and one after the other.

        Args:
            count: of questions.
            seen, answer: tokens of a picture, and of an answer.
            name: of the questions.
            longer: tokens by which each question is longer than the one before.
        """
        config = GenerationConfig(TEXT_STEPS, 0, self.mask + 1)
        offset, codes = self.mask + 1, self.backbone.config.vocab_size - self.mask - 1
        made = []
        for at in range(count):
            picture = [offset + (31 * at + i) % codes for i in range(seen)]
            question = self.text(20 + at * longer, at * longer)
            made.append(Sample([[*self.text(30, 0), *picture, *question]], [self.mask] * answer))
        _, first, peak = self.fill(made, config)
        at_once, in_turn = Phases(), Phases()
        _, together, _ = self.fill(made, config, at_once)
        self.note(f"{count} {name} at once, s", together)
        self.note(f"{count} {name} at once for the first time, graphs made, s", first)
        self.note(f"{count} {name} at once, peak GB of {self.asked(made, config):.2f} asked for", peak)
        self.fill(made[:1], config)
        apart = sum(self.fill([one], config, in_turn)[1] for one in made)
        self.note(f"{count} {name} one after the other, s", apart)
        self.note(f"{count} {name}, times as fast at once", apart / together)
        for way, phases in (("at once", at_once), ("one after the other", in_turn)):
            for phase, value in phases.figures().items():
                self.note(f"{count} {name} {way}: {phase}", value)

    def encode(self, count: int, side: int, sizes: Vision) -> None:
        """What encoding so many pictures takes, the same at once and one after the other: the tower runs one at a time.

        Args:
            side: patches of a picture each way.
            sizes: of the tower, filled with random weights.
        """
        codes = self.backbone.config.vocab_size - self.backbone.config.image_token_offset
        config = tokenizer_config(sizes, codes)
        tokenizer = build(config).to(self.dtype).to_empty(device=self.device).requires_grad_(False)
        for parameter in tokenizer.parameters():
            parameter.normal_(0, max(parameter[0].numel(), 1) ** -0.5)
        pixels = torch.randn(3, 16 * side, 16 * side)
        tokenizer.encode(pixels)
        began = time.perf_counter()
        for _ in range(count):
            tokenizer.encode(pixels)
        seconds = time.perf_counter() - began
        self.note(f"{count} pictures of {side} x {side} patches to tokens, resizing aside, s", seconds)


@torch.no_grad()
def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs="*", default=[1, 4, 8, 16], help="sizes of batches, 1 first")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--weights", choices=WEIGHTS, default=WEIGHTS[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU")
    add_json(parser)
    options = parser.parse_args()
    if options.tiny:
        device, dtype, config, sizes = torch.device("cpu"), torch.float32, load_oracle().tiny_config(), (40, 64, 8)
        tower = Vision(2, 32, 2, 64, 64, 16)
    elif torch.cuda.is_available():
        device, dtype, config, sizes = torch.device("cuda"), torch.bfloat16, released_backbone(), (GRID, SEEN, ANSWER)
        tower = Vision()
    else:
        print("no GPU at hand")
        return
    grid, seen, answer = sizes
    bench = Bench(even_backbone(config, device, dtype, options.weights), device, dtype, options.json)
    for tokens in (64, 512):
        bench.note(f"experts hit by {tokens} tokens", bench.hits(tokens))
    bench.questions(options.questions, seen, answer, "questions of other lengths", 1)
    bench.questions(options.questions, seen, answer, "times the same question", 0)
    if options.pictures:
        bench.pictures(options.pictures, grid)
    bench.encode(options.questions, math.isqrt(seen), tower)
    show(f"Batches, {device.type}, {dtype}, weights {options.weights}", bench.figures, options.json)


if __name__ == "__main__":
    main()
