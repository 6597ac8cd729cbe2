"""What a checkpoint that has learnt the harder world gets right (`dev.miniature.signs`); see `benchmarks.quality`.

Prompts are sampled side by side. Held out are contents; rows of their own have combinations and wordings that training
never had, prompts written by hand, and prompts that need a plan, with and without thinking.

Decoding, one picture after the other, is most of the time. A picture follows from its tokens, and most rows draw the
same tokens for the same prompt, so what a picture shows is kept by its tokens: one process that measures many rows on a
share of the prompts decodes a fraction of what a process a row would.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch

from dev.miniature.examples import Example
from dev.miniature.signs import edits, handwritten, plans
from dev.miniature.signs.checker import Report, changed_places, look, preserved
from dev.miniature.signs.drawing import painted
from dev.miniature.signs.examples import example
from dev.miniature.signs.texts import same_answer
from dev.miniature.signs.world import TOKEN, Scene, origin_of
from llada_core.engine import LLaDAUni
from llada_core.image_tokens import ImageTokens, join
from llada_core.options import Decoding, Guidance, Sampling, Sprint

from .tally import Tally

PAPERS = Sprint()  # the paper's settings are the defaults
WHOLE = Sprint(image_keep_ratio=1.0, threshold=0.95)  # the paper's other setting
SHORT = Sampling(thinking_length=256)  # plans here are shorter; a model that has not learnt to stop must not go on


class Quality:
    """The measurements on one checkpoint.

    Args:
        model: the checkpoint.
        count: examples a task.
        normal: pictures that the normal decoder decodes too.
        seed: of the examples.
        side: prompts that are sampled side by side.
        share: (i, n): of all examples the i-th, the i + n-th and so on, so that n processes measure all.
    """

    def __init__(
        self,
        model: LLaDAUni | None,
        count: int,
        normal: int,
        seed: int = 0,
        side: int = 16,
        share: tuple[int, int] = (0, 1),
    ):
        self.model, self.count, self.seed, self.side, self.share = model, count, seed, side, share
        self.normal = len(self.shared(range(normal)))
        self._reports: dict[tuple, Report] = {}
        self._codes: dict[Scene, torch.Tensor] = {}

    def shared(self, made: Sequence) -> Sequence:
        """Those of all that are this share's."""
        return made[self.share[0] :: self.share[1]]

    def examples(
        self, task: str, split: str = "held-out", kinds: Sequence[str | None] = (None,), count: int | None = None
    ) -> list[Example]:
        """This share's examples of a task, always the same ones; kinds take turns."""
        rng = random.Random(f"{task} {split} {self.seed}")
        made = [example(rng, split, task, kinds[i % len(kinds)]) for i in range(count or self.count)]
        return list(self.shared(made))

    def parts(self, made: Iterable[Example]) -> Iterable[list[Example]]:
        """As many at a time as are sampled side by side."""
        left = iter(made)
        while part := list(islice(left, self.side)):
            yield part

    def picture(self, tokens: ImageTokens, turbo: bool = True) -> torch.Tensor:
        """The decoded tokens of one picture."""
        (image,) = self.model.decode(tokens, Decoding(turbo=turbo))
        return image

    def report(self, tokens: ImageTokens, turbo: bool = True) -> Report:
        """What the decoded tokens of one picture show."""
        (grid,) = tokens.grids
        key = turbo, tuple(grid.shape), grid.to(torch.int64).numpy().tobytes()
        if key not in self._reports:
            self._reports[key] = look(self.picture(tokens, turbo).numpy())
        return self._reports[key]

    def true_codes(self, scene: Scene) -> torch.Tensor:
        """The codes int64 [h, w] of a scene's true picture."""
        if scene not in self._codes:
            (self._codes[scene],) = self.encode([scene], "understand", halved=True).grids
        return self._codes[scene]

    def encode(self, scenes: Iterable[Scene], purpose: str, halved: bool = False) -> ImageTokens:
        """Pictures of scenes as tokens, one by one: they may differ in size. `halved`: also those only drawn."""
        pixels = [torch.from_numpy(painted(scene))[None] / 255 for scene in scenes]
        areas = [one.shape[1] * one.shape[2] // 4 if halved else 0 for one in pixels]
        return join([self.model.encode(one, purpose, pixels=area) for one, area in zip(pixels, areas, strict=True)])

    def redraw(self) -> Tally:
        """True pictures through SigLIP-VQ and the decoders: what no backbone can do better than."""
        tally = Tally()
        for index, made in enumerate(self.examples("draw")):
            scene = made.scenes[-1]
            tokens = ImageTokens((self.true_codes(scene),), self.model.codebook_size)
            report = self.report(tokens)
            tally.add("turbo", report.shows(scene))
            if scene.sign:
                tally.add("words", report.scene.sign == scene.sign)
            if index < self.normal:
                tally.add("normal", self.report(tokens, turbo=False).shows(scene))
        return tally

    def draw(self, made: list[Example], thinking: bool = False, both: bool = False, **options: Any) -> Tally:
        """Text to image; `both` has the first pictures decoded by both decoders."""
        tally, index = Tally(), 0
        for part in self.parts(made):
            sizes = [[TOKEN * side for side in one.scenes[-1].grid] for one in part]
            prompts, heights, widths = ([*values] for values in zip(*_asked(part, sizes), strict=True))
            with tally.sampling() as usages:
                given = {"sampling": SHORT, **options}
                drawn = self.model.generate(prompts, heights, widths, thinking=thinking, **given)
                usages += [one.usage for one in drawn]
            for one, found in zip(part, drawn, strict=True):
                scene = one.scenes[-1]
                report = self.report(found.tokens)
                judge(tally, scene, report)
                tally.add("tokens", (found.tokens.grids[0] == self.true_codes(scene)).float().mean())
                if one.kind:
                    tally.add(one.kind, report.shows(scene))
                if thinking:
                    tally.add("plan right", plans.read_thought(found.thinking, scene.grid) == scene)
                if both and index < self.normal:
                    slow = self.report(found.tokens, turbo=False)
                    tally.add("turbo, of both", report.shows(scene))
                    tally.add("normal, of both", slow.shows(scene))
                index += 1
        return tally

    def questions(self, split: str = "held-out", **options: Any) -> Tally:
        """Questions about one or two pictures, by kind."""
        tally = Tally()
        for part in self.parts(self.examples("understand", split)):
            images = [self.encode(one.references, "understand") for one in part]
            asked = [one.instruction for one in part]
            with tally.sampling() as usages:
                answers = self.model.answer(asked, images, max_new_tokens=160, **options)
                usages += [one.usage for one in answers]
            for one, answer in zip(part, answers, strict=True):
                right = same_answer(answer.text, one.frames[0][0])
                tally.add("right", right)
                tally.add(one.kind, right)
        return tally

    def edits(self, split: str = "held-out", masked: bool = False, **options: Any) -> Tally:
        """Edits of one picture, and with an object of a second one; the rest must stay.

        With `masked`, edits of one place, of which only that is drawn anew.
        """
        tally = Tally()
        made = self.examples("edit", split, _PLACED if masked else (None,))
        for part in self.parts(made):
            references = [self.encode(one.references, "edit") for one in part]
            given: dict[str, Any] = {"sampling": SHORT, **options}
            if masked:
                given["mask"] = [place_mask(one.references[0], one.scenes[-1]) for one in part]
            with tally.sampling() as usages:
                drawn = self.model.generate([one.instruction for one in part], references=references, **given)
                usages += [one.usage for one in drawn]
            for one, found in zip(part, drawn, strict=True):
                before, after = one.references[0], one.scenes[-1]
                report = self.report(found.tokens)
                tally.add("right", report.shows(after))
                tally.add("rest kept", preserved(before, report, changed_places(before, after)))
                tally.add(one.kind, report.shows(after))
        return tally

    def stories(self, **options: Any) -> Tally:
        """Stories of two to four pictures: every picture and every text."""
        tally = Tally()
        for made in self.examples("story", "train", count=max(1, self.count // 5)):
            with tally.sampling() as usages:
                told = self.model.interleave(made.instruction, 5, sampling=SHORT, **options)
                usages.append(told.usage)
            wanted = [scene for _, scene in made.frames if scene]
            grids = told.tokens.grids if told.tokens else ()
            tally.add("ended by itself", told.complete and len(grids) == len(wanted))
            tally.add("texts", all(text in told.text for text, _ in made.frames))
            for index, scene in enumerate(wanted):
                drawn = index < len(grids) and ImageTokens((grids[index],), self.model.codebook_size)
                fits = bool(drawn) and tuple(grids[index].shape) == scene.grid
                tally.add("pictures", fits and self.report(drawn).shows(scene))
        return tally


_PLACED = (
    "recolour",
    "replace",
    "add",
    "remove",
    "refill",
    "resize",
    "touch",
)  # kinds of edits that are about one place


def _asked(part: list[Example], sizes: list[list[int]]) -> list[tuple[str, int, int]]:
    return [(one.instruction, height, width) for one, (height, width) in zip(part, sizes, strict=True)]


def place_mask(before: Scene, after: Scene) -> torch.Tensor:
    """The place that an edit is about, and the column before it, float32 [height, width], 1 there."""
    place = edits.only_place(before, after)
    if place is None:
        raise ValueError("an edit of more than one place has no mask here")
    mask = torch.zeros(before.grid[0] * TOKEN, before.grid[1] * TOKEN)
    row, column = (at * TOKEN for at in origin_of(place, before.grid))
    mask[row : row + 3 * TOKEN, column - TOKEN : column + 3 * TOKEN] = 1
    return mask


def judge(tally: Tally, scene: Scene, report: Report) -> None:
    """Compare a report with the scene, place by place and as a whole."""
    found = report.scene
    for thing in scene.things:
        here = found.at(thing.place)
        best = next((other for other in here if other.second == thing.second), here[0] if here else None)
        for name in ("shape", "colour", "size", "fill", "front", "touching"):
            tally.add(name, best is not None and getattr(best, name) == getattr(thing, name))
    tally.add("count", len(found.things) == len(scene.things))
    tally.add("background", found.background == scene.background)
    if scene.sign:
        tally.add("words", found.sign == scene.sign)
        tally.add("letters", bool(found.sign) and found.sign.text == scene.sign.text)
    tally.add("all right", report.shows(scene))
    tally.add(f"all right, {len(scene.things)}", report.shows(scene))


def measurements(q: Quality) -> dict[str, Callable[[], Tally]]:
    """Every row of the table, by name."""

    def drawn(split: str = "held-out", kinds: Sequence[str | None] = (None,)) -> list[Example]:
        return q.examples("draw", split, kinds)

    def planned() -> list[Example]:
        return q.examples("think", "held-out", plans.KINDS)

    return {
        "redraw": q.redraw,
        "draw, plain": lambda: q.draw(drawn(), both=True),
        "draw, SPRINT": lambda: q.draw(drawn(), sprint=PAPERS),
        "draw, SPRINT, whole pictures": lambda: q.draw(drawn(), sprint=WHOLE),
        "draw, every round": lambda: q.draw(drawn(), sampling=Sampling(threshold=1.0)),
        "draw, two rounds": lambda: q.draw(drawn(), sampling=Sampling(steps=2)),
        "draw, no guidance": lambda: q.draw(drawn(), guidance=Guidance(text=1.0)),
        "draw, guidance 4": lambda: q.draw(drawn(), guidance=Guidance(text=4.0)),
        "draw, no rescale": lambda: q.draw(drawn(), guidance=Guidance(rescale=0.0)),
        "draw, threshold 0.8": lambda: q.draw(drawn(), sampling=Sampling(threshold=0.8)),
        "draw, temperature 0.5": lambda: q.draw(drawn(), sampling=Sampling(temperature=0.5)),
        "draw, thinking": lambda: q.draw(drawn(), thinking=True),
        "draw, combinations": lambda: q.draw(drawn("combination")),
        "draw, other words": lambda: q.draw(drawn("wording")),
        "draw, by hand": lambda: q.draw(list(q.shared(handwritten.examples()[: q.count]))),
        "plans, plain": lambda: q.draw(planned()),
        "plans, thinking": lambda: q.draw(planned(), thinking=True),
        "plans, thinking, SPRINT": lambda: q.draw(planned(), thinking=True, sprint=PAPERS),
        "questions, plain": q.questions,
        "questions, SPRINT": lambda: q.questions(sprint=PAPERS),
        "questions, other words": lambda: q.questions("wording"),
        "edit, plain": q.edits,
        "edit, SPRINT": lambda: q.edits(sprint=PAPERS),
        "edit, SPRINT, whole pictures": lambda: q.edits(sprint=WHOLE),
        "edit, no guidance": lambda: q.edits(guidance=Guidance(text=0.0)),
        "edit, guidance 2": lambda: q.edits(guidance=Guidance(text=2.0)),
        "edit, guidance 2, SPRINT": lambda: q.edits(guidance=Guidance(text=2.0), sprint=PAPERS),
        "edit, image guidance": lambda: q.edits(guidance=Guidance(text=4.0, image=1.5)),
        "edit, in a mask": lambda: q.edits(masked=True),
        "edit, other words": lambda: q.edits("wording"),
        "stories, plain": q.stories,
    }
