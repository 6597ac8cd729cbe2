"""From prompts to texts and images: room in the context, memory, batches, progress (docs/model.md, Block diffusion)."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from ..backbone.attention_kernels import Attend, sdpa
from ..backbone.cache import Prefix
from ..backbone.config import BackboneConfig
from ..backbone.cuda_graphs import GraphStore
from ..backbone.runner import CachedRunner
from ..errors import InputError
from ..image_tokens import ImageTokens
from ..options import IMAGE_STEPS, Guidance, Sampling, Sprint
from ..placement import Placement
from ..progress import Progress, ProgressCallback, TokenPreview, report, shifted, side_by_side
from ..prompts import Prompts
from ..vocabulary import Vocabulary
from .batch import Batch, Sample, Track
from .block_diffusion import GenerationConfig, Output, generate, prepare
from .certainty import certainty
from .guidance import guided_branches
from .working_bytes import working_bytes

log = logging.getLogger(__name__)

BackboneBytes = Callable[[BackboneConfig, torch.dtype], int]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Usage:
    """What a generation took: new tokens, backbone rounds, seconds; of one among several its share of the seconds."""

    tokens: int
    rounds: int
    seconds: float

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.tokens + other.tokens, self.rounds + other.rounds, self.seconds + other.seconds)

    def __str__(self) -> str:
        speed = self.tokens / max(self.seconds, 1e-9)
        return f"{self.tokens} tokens in {self.rounds} rounds, {self.seconds:.1f} s, {speed:.1f} tokens/s"


@dataclass(frozen=True)
class Text:
    """A text to write: its prompt, the most new tokens, the seed of the draws, and what is cached of the prompt."""

    prompt: list[int]
    most: int
    seed: int
    prefix: Prefix | None = None


@dataclass(frozen=True)
class Image:
    """An image to draw.

    Attributes:
        prompts: up to and with the header of an image of height x width tokens.
        seed: of the draws.
        given: its ids, row by row, the mask id where a token is to be drawn; None draws all.
        prefix: what is cached of the conditional prompt.
    """

    prompts: Prompts
    height: int
    width: int
    seed: int
    given: Sequence[int] | None = None
    prefix: Prefix | None = None


@dataclass(frozen=True)
class Written:
    """The ids of a text up to and with its stop, what it took, and what is cached of prompt and text."""

    ids: list[int]
    usage: Usage
    prefix: Prefix | None


@dataclass(frozen=True)
class Drawn:
    """An image, what it took, and what is cached of prompt and image."""

    tokens: ImageTokens
    usage: Usage
    prefix: Prefix | None


@dataclass(frozen=True)
class Pipeline:
    """Everything the tasks share: vocabulary, sizes, options, how to get the backbone, whom to tell.

    Attributes:
        place: how much working memory it takes (a function of configuration and dtype) -> the backbone, ready to run.
        fits: the same -> whether a device could have so much at best.
        attend: the backbone's attention kernel.
        store: CUDA graphs of earlier calls.
    """

    vocabulary: Vocabulary
    config: BackboneConfig
    sampling: Sampling
    sprint: Sprint | None
    place: Callable[[BackboneBytes], Placement]
    progress: ProgressCallback | None
    fits: Callable[[BackboneBytes], bool] = lambda _: True
    attend: Attend = sdpa
    store: GraphStore = field(default_factory=GraphStore)

    def draw(self, images: Sequence[Image], guidance: Guidance, keep_prefix: bool = False) -> list[Drawn]:
        """Images that follow their prompts' headers, all with the same number of branches, in one batch."""
        low = self.vocabulary.image_offset
        samples = []
        for image in images:
            branches, count = guided_branches(image.prompts, guidance), image.height * image.width
            self.check_room(branches, count, f"an image of {image.height} x {image.width} tokens")
            new = [self.vocabulary.mask] * count if image.given is None else image.given
            samples.append(Sample(branches, new, _generator(image.seed), image.prefix))
        steps, high = self.sampling.steps or IMAGE_STEPS, self.vocabulary.vocab_size
        config = self._config(steps, low, high, guidance=guidance, keep_prefix=keep_prefix)

        def grid(ids: list[int], image: Image) -> torch.Tensor:
            return torch.tensor(ids).view(image.height, image.width) - low

        def preview(tracks: list[tuple[int, Track]]) -> TokenPreview:
            grids = [grid(track.ids[track.begin : track.end], images[at]).clamp_min(-1) for at, track in tracks]
            return TokenPreview(side_by_side(grids))

        found = self._run(samples, config, "backbone", preview)
        return [
            Drawn(ImageTokens((grid(output.ids, image),), self.vocabulary.codebook_size), usage, output.prefix)
            for image, (output, usage) in zip(images, found, strict=True)
        ]

    def certainty(self, image: Image, guidance: Guidance) -> tuple[torch.Tensor, Usage]:
        """How sure the model is of each token of an image that is all given, float32 [height, width]; what it took."""
        branches = guided_branches(image.prompts, guidance)
        sizes = f"an image of {image.height} x {image.width} tokens"
        self.check_room(branches, image.height * image.width, sizes)
        low, high = self.vocabulary.image_offset, self.vocabulary.vocab_size
        config = replace(self._config(1, low, high, guidance=guidance), sprint=None)
        samples = [Sample(branches, image.given or [])] * 2

        def work(runner: CachedRunner, batch: Batch) -> tuple[torch.Tensor, Usage]:
            began = time.perf_counter()
            found = certainty(runner, batch, config)
            return found, Usage(0, len(batch.starts), time.perf_counter() - began)

        found, usage = self._with_backbone(samples, config, work)
        return found.view(image.height, image.width), usage

    def write(
        self, texts: Sequence[Text], steps: int, stops: frozenset[int], stage: str, keep_prefix: bool = False
    ) -> list[Written]:
        """Texts after their prompts, up to and with a stop, in one batch."""
        samples = []
        for text in texts:
            self.check_room([text.prompt], 1, "a text")
            room = self.room(text.prompt)
            if text.most > room:
                log.info("%s: at most %d new tokens instead of %d, the rest of the context", stage, room, text.most)
            new = [self.vocabulary.mask] * min(text.most, room)
            samples.append(Sample([text.prompt], new, _generator(text.seed), text.prefix))
        config = self._config(steps, 0, self.vocabulary.image_offset, stops, keep_prefix=keep_prefix)

        def preview(tracks: list[tuple[int, Track]]) -> str:
            return "\n\n".join(self.vocabulary.decode(track.new) for _, track in tracks)

        found = self._run(samples, config, stage, preview)
        return [Written(output.ids, usage, output.prefix) for output, usage in found]

    def room(self, prompt: list[int]) -> int:
        """Tokens that still fit the context after a prompt."""
        return self.config.max_position_embeddings - len(prompt)

    def check_room(self, prompts: list[list[int]], count: int, what: str) -> None:
        """Raise InputError where prompt and `count` new tokens do not fit the context."""
        longest, room = max(map(len, prompts)), self.config.max_position_embeddings
        if longest + count > room:
            found = f"{longest} prompt tokens and {what}, {longest + count} in all"
            remedy = "Choose a smaller size, fewer or smaller reference images, or a shorter prompt."
            raise InputError("length", found, f"at most {room} tokens, the model's context", remedy)

    def _config(self, steps: int, low: int, high: int, stops=frozenset(), guidance=None, keep_prefix=False):
        return GenerationConfig(steps, low, high, stops, self.sampling, guidance, self.sprint, keep_prefix)

    def _run(
        self,
        samples: list[Sample],
        config: GenerationConfig,
        stage: str,
        preview: Callable[[list[tuple[int, Track]]], Any],
    ) -> list[tuple[Output, Usage]]:
        """Generate all samples, at once where they fit; reports go out under the name of the stage.

        preview: (index, track) of the samples of a part -> what can be shown of them.
        """
        parts = self._parts(samples, config)
        if len(parts) > 1:
            sizes = " + ".join(str(len(part)) for part in parts)
            log.info(
                "%s: %d at once do not fit the device's memory; %s one after the other", stage, len(samples), sizes
            )
            config = replace(config, keep_prefix=False)  # of all parts they would be as much again
        found: list[tuple[Output, Usage]] = []
        for index, part in enumerate(parts):
            progress = shifted(self.progress, index, len(parts))
            found += self._run_part(part, len(found), config, stage, preview, progress)
        return found

    def _parts(self, samples: list[Sample], config: GenerationConfig) -> list[list[Sample]]:
        """The samples in parts that fit, each as large as it can be; one sample is a part whether it fits or not."""
        parts: list[list[Sample]] = []
        for sample in samples:
            if parts and self.fits(_bytes_of([*parts[-1], sample], config, self.vocabulary.mask)):
                parts[-1].append(sample)
            else:
                parts.append([sample])
        return parts

    def _run_part(
        self,
        samples: list[Sample],
        first: int,
        config: GenerationConfig,
        stage: str,
        preview: Callable[[list[tuple[int, Track]]], Any],
        progress: ProgressCallback | None,
    ) -> list[tuple[Output, Usage]]:
        began = 0.0

        def work(runner: CachedRunner, batch: Batch) -> list[Output]:
            nonlocal began
            began = time.perf_counter()  # weights are in place
            tracks, total = list(enumerate(batch.tracks, first)), len(batch.starts) * config.steps

            def show() -> Any:
                return preview(tracks)

            def on_round(index: int, done: int) -> None:
                report(progress, Progress(index * config.steps + done, total, stage, show))

            report(progress, Progress(0, total, stage))
            outputs = generate(runner, batch, config, on_round)
            report(progress, Progress(total, total, stage, show))
            return outputs

        outputs = self._with_backbone(samples, config, work)
        share = (time.perf_counter() - began) / len(samples)
        given = [sum(token != self.vocabulary.mask for token in sample.new) for sample in samples]
        return [
            (output, Usage(len(output.ids) - count, output.rounds, share))
            for output, count in zip(outputs, given, strict=True)
        ]

    def _with_backbone(
        self, samples: list[Sample], config: GenerationConfig, work: Callable[[CachedRunner, Batch], Result]
    ) -> Result:
        """What `work` returns of a runner and a batch, with the backbone placed for them."""
        placement = self.place(_bytes_of(samples, config, self.vocabulary.mask))
        module, device, dtype, mask = placement.module, placement.device, placement.dtype, self.vocabulary.mask
        runner, batch = prepare(module, samples, config, mask, device, dtype, self.attend, self._graphs(placement))
        try:
            result = work(runner, batch)
        except BaseException:
            runner.close()
            raise
        runner.finish()
        if placement.before_moving is None:
            self.store.close()
        return result

    def _graphs(self, placement: Placement) -> GraphStore | None:
        """Where graphs are kept, if rounds may become graphs; let go of by the manager before weights move."""
        if not placement.resident:
            return None
        self.store.follow(placement.module, placement.moves)
        if placement.before_moving is not None and self.store.close not in placement.before_moving:
            placement.before_moving.append(self.store.close)
        return self.store


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed % 2**64)  # batches and stories count up from a seed


def _bytes_of(samples: Sequence[Sample], config: GenerationConfig, mask: int) -> BackboneBytes:
    """What a batch takes besides the weights, as a function of the backbone's configuration and the dtype."""
    prompts = [max(map(len, sample.branches)) for sample in samples]
    length = max(prompt + len(sample.new) for prompt, sample in zip(prompts, samples, strict=True))
    given = max(
        prompt + sum(token != mask for token in sample.new) for prompt, sample in zip(prompts, samples, strict=True)
    )
    return lambda sizes, dtype: working_bytes(
        sizes,
        len(samples[0].branches),
        length,
        dtype,
        config.sampling.block_length,
        sprint=config.sprint is not None,
        samples=len(samples),
        kept=config.keep_prefix or any(sample.prefix is not None for sample in samples),
        given=given,
    )
