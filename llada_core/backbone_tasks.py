"""What LLaDAUni does with its backbone: draw, edit, vary, answer, tell a story."""

from collections.abc import Callable
from typing import Any

import torch

from .backbone.attention_kernels import Attend
from .backbone.config import BackboneConfig
from .backbone.cuda_graphs import GraphStore
from .checkpoint.component import Component
from .checks import check_count, check_flag, check_optional, check_seed, check_text
from .image_tokens import ImageTokens
from .lists import broadcast
from .options import MAX_BATCH, MAX_IMAGES, MAX_NEW_TOKENS, Guidance, Sampling, Sprint
from .placement import ComponentManager, Placement, could_fit
from .progress import ProgressCallback
from .sampling import tasks
from .sampling.interleaved import Story, generate_interleaved
from .sampling.pipeline import Pipeline
from .sampling.tasks import Generation
from .token_edits import one_grid
from .vocabulary import Vocabulary


class BackboneTasks:
    """The tasks of the backbone, over a checkpoint that is open. LLaDAUni is one."""

    vocabulary: Vocabulary
    config: BackboneConfig
    manager: ComponentManager
    _components: dict[str, Component]
    _attend: Attend
    _graphs: GraphStore

    def _place(self, part: str, working_bytes: Callable[[Any, torch.dtype], int]) -> Placement:
        raise NotImplementedError

    @property
    def codebook_size(self) -> int:
        """Number of image codes."""
        return self.vocabulary.codebook_size

    def generate(
        self,
        prompt: str | list[str],
        height: int | list[int] = 1024,
        width: int | list[int] = 1024,
        *,
        references: ImageTokens | list[ImageTokens] | None = None,
        thinking: bool = False,
        sampling: Sampling | None = None,
        guidance: Guidance | None = None,
        sprint: Sprint | None = None,
        seed: int | list[int] = 0,
        progress: ProgressCallback | None = None,
        tokens: ImageTokens | list[ImageTokens] | None = None,
        mask: torch.Tensor | list[torch.Tensor] | None = None,
    ) -> Any:
        """Draw an image, edit references, or draw a part anew; several at once where an input is a list.

        Each of several is, token for token, what it is alone, up to the rounding of larger products (docs/model.md,
        Batches). Lists must be equally long; what is no list is the same for all. What does not fit the device's memory
        at once is cut into parts, which the log says.

        Args:
            prompt: what to draw, or the instruction of the edit; not empty.
            height, width: of the decoded picture in pixels, multiples of 32; not read with references, whose first
                gives the size.
            references: images to edit.
            thinking: write a plan first; not with references.
            sampling, guidance, sprint: options; guidance None is text 2, or 4 when editing.
            seed: of the draws at temperature > 0, 0 to 2**64 - 1.
            progress: called after each round, stages "thinking" and "backbone".
            tokens: an image to start from, whose size is the result's; the first reference by default.
            mask: float or bool [height, width] of any size. The cells that it touches (above 0) are drawn anew, all
                others stay token for token (docs/model.md, Masked drawing).

        Returns:
            A Generation; a list of them where an input is a list.

        Raises:
            InputError: an empty prompt, a size that is no multiple of 32, more tokens than the context holds, tokens
                of another codebook, thinking with references, a mask with nothing to start from, lists of different
                lengths.
        """
        inputs = {"prompt": prompt, "height": height, "width": width, "references": references, "seed": seed}
        each, listed = broadcast(**inputs, tokens=tokens, mask=mask)
        for one in each:
            check_text("prompt", one["prompt"])
            check_seed(one["seed"])
            for name in ("references", "tokens"):
                self._check_tokens(name, one[name])
        check_optional("guidance", guidance, Guidance)
        check_flag("thinking", thinking)
        asked = [tasks.Request.of(**one) for one in each]
        found = tasks.generate(self._pipeline(sampling, sprint, progress), asked, guidance, thinking)
        return found if listed else found[0]

    def vary(
        self,
        tokens: ImageTokens,
        prompt: str,
        strength: float = 0.3,
        count: int = 1,
        *,
        least_certain: bool = False,
        references: ImageTokens | None = None,
        sampling: Sampling | None = None,
        guidance: Guidance | None = None,
        sprint: Sprint | None = None,
        seed: int = 0,
        progress: ProgressCallback | None = None,
    ) -> list[Generation]:
        """Variations of an image: a share of its tokens is masked again and drawn, the others stay.

        Args:
            tokens: one image.
            prompt: what it shows; with references, the instruction it came from.
            strength: 0...1, the share of its cells; at least one.
            count: of variations, drawn at once; variation i takes seed + i.
            least_certain: mask the cells that the model is least sure of, which is found out first, instead of cells
                by seed.
            sampling: draws at temperature 1 by default: at 0 all would be drawn alike.
            references, guidance, sprint, progress: as in `generate`.
        """
        check_text("prompt", prompt)
        self._check_tokens("references", references)
        self._check_tokens("tokens", tokens)
        start = one_grid(tokens)
        check_count("count", count, 1, MAX_BATCH)
        check_seed(seed)
        check_flag("least_certain", least_certain)
        check_optional("guidance", guidance, Guidance)
        one = tasks.Request(prompt, seed, (start.shape[0], start.shape[1]), references, start)
        pipeline = self._pipeline(sampling or Sampling(temperature=1.0), sprint, progress)
        return tasks.vary(pipeline, one, strength, count, least_certain, guidance)

    def answer(
        self,
        question: str | list[str],
        images: ImageTokens | list[ImageTokens] | None = None,
        *,
        max_new_tokens: int = 2048,
        sampling: Sampling | None = None,
        sprint: Sprint | None = None,
        seed: int | list[int] = 0,
        progress: ProgressCallback | None = None,
    ) -> Any:
        """Answer a question about zero, one or several images; several at once where an input is a list.

        Args:
            question: not empty.
            images: what it is about.
            max_new_tokens: the longest answer, 1 to 16,384; shortened, with a log line, where the context ends earlier.
            sampling, sprint, seed, progress: as in `generate`; stage "answer".

        Returns:
            An Answer; a list of them where an input is a list.
        """
        asked, listed = broadcast(question=question, images=images, seed=seed)
        for one in asked:
            check_text("question", one["question"])
            check_optional("images", one["images"], ImageTokens)
            check_seed(one["seed"])
        check_count("max_new_tokens", max_new_tokens, 1, MAX_NEW_TOKENS, "2048 is the default.")
        found = tasks.answer(self._pipeline(sampling, sprint, progress), asked, max_new_tokens)
        return found if listed else found[0]

    def interleave(
        self,
        instruction: str,
        max_images: int = 4,
        *,
        references: ImageTokens | None = None,
        sampling: Sampling | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
        progress: ProgressCallback | None = None,
    ) -> Story:
        """Tell a story in text and images (docs/model.md, Interleaved generation).

        Args:
            instruction: what to tell; not empty.
            max_images: the story ends after so many, 1 to 16.
            references: images to start from.
            sampling: steps is of images; texts take thinking_steps and at most thinking_length tokens each.
            guidance: image > 0 draws every image but the first as an edit of the one before it.
            seed, progress: as in `generate`; stages "story" and "backbone".
        """
        check_text("instruction", instruction)
        check_optional("references", references, ImageTokens)
        check_optional("guidance", guidance, Guidance)
        check_count("max_images", max_images, 1, MAX_IMAGES, "A story has one image or more.")
        check_seed(seed)
        pipeline = self._pipeline(sampling, None, progress)
        return generate_interleaved(pipeline, instruction, references, max_images, guidance or Guidance(), seed)

    def _check_tokens(self, name: str, tokens: ImageTokens | None) -> None:
        check_optional(name, tokens, ImageTokens)
        if tokens is not None:
            tokens.for_codebook(self.codebook_size)

    def _pipeline(self, sampling: Sampling | None, sprint: Sprint | None, progress) -> Pipeline:
        check_optional("sampling", sampling, Sampling)
        check_optional("sprint", sprint, Sprint)
        backbone = self._components["backbone"]

        def fits(working_bytes: Callable[[Any, torch.dtype], int]) -> bool:
            return could_fit(self.manager, "backbone", backbone, lambda dtype: working_bytes(self.config, dtype))

        return Pipeline(
            self.vocabulary,
            self.config,
            sampling or Sampling(),
            sprint,
            lambda working_bytes: self._place("backbone", working_bytes),
            progress,
            fits,
            self._attend,
            self._graphs,
        )
