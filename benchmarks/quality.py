"""What the trained miniature gets right, and how fast: held-out prompts, judged by a checker that looks at pixels.

Text to image, thinking, questions, edits and stories about scenes that training never saw; plain sampling against
SPRINT with the paper's settings, guidance on against off, the turbo decoder against the normal one. Every picture goes
from the backbone's tokens through the decoder to pixels before `dev.miniature.checker` judges it; the model never
judges itself. Rounds are the backbone's, a generation; tokens/s are of the backbone alone.

    python -m benchmarks.quality CHECKPOINT [--world signs] [--count 300] [--device cuda] [--markdown FILE]

`--weights 8-bit` or `4-bit` measures the same on layers that are quantized while they are read; `3 bits` and `2 bits`
on a backbone rounded to so few that it must show: the proof that the instrument can tell. Each row's first figure has
a confidence interval, by bootstrap over the prompts.

The normal decoder takes 49 rounds of two evaluations a picture, most of the time on a CPU: `--normal 50` has it decode
only the first 50 pictures, and compares turbo with it on the same ones.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from dev.miniature.checker import Report, changed_places, look, preserved
from dev.miniature.examples import Example, example
from dev.miniature.texts import read_scene, same_answer
from dev.miniature.world import Scene, Thing, render
from dev.miniature.worlds import WORLDS
from llada_core.engine import LLaDAUni
from llada_core.image_tokens import ImageTokens, join
from llada_core.options import Decoding, Guidance, Sampling, Sprint

from . import quality_signs
from .quality_table import row, score, table
from .rounded import WEIGHTS, opened
from .support import add_json, show
from .tally import Tally

SPRINT = Sprint()  # the paper's settings are the defaults
WHOLE = Sprint(image_keep_ratio=1.0)  # the paper's other setting: no position of a picture is hidden
SHORT = Sampling(thinking_length=160)  # plans here are shorter; a model that has not learnt to stop must not go on
SCHEDULE = Sampling(threshold=1.0)  # no token is accepted early
HASTY = Sampling(steps=2)  # two rounds a block at most, where eight are the default
ATTRIBUTES = ("shape", "colour", "size", "place")


def examples(task: str, count: int, seed: int) -> list[Example]:
    """Held-out examples of a task, always the same ones."""
    rng = random.Random(f"{task} {seed}")
    return [example(rng, "held-out", task) for _ in range(count)]


def judge(tally: Tally, scene: Scene, report: Report) -> None:
    """Compare a report with the scene, object by object and as a whole."""
    left = list(report.things)
    for thing in scene.things:
        best = max(left, key=lambda found: _alike(found, thing), default=None)
        if best is not None:
            left.remove(best)
        for name in ATTRIBUTES:
            right = best is not None and getattr(best, name) == getattr(thing, name)
            tally.add(name, right)
            if len(scene.things) == 1:
                tally.add(f"{name}, one object", right)
    tally.add("count", len(report.things) == len(scene.things))
    tally.add("background", report.background == scene.background)
    tally.add("all right", report.shows(scene))
    tally.add(f"all right, {len(scene.things)}", report.shows(scene))


def _alike(first: Thing, second: Thing) -> int:
    # The place counts most: it tells which object is meant where several are alike.
    return 2 * (first.place == second.place) + sum(getattr(first, n) == getattr(second, n) for n in ATTRIBUTES[:3])


class Quality:
    """The measurements on one checkpoint.

    Args:
        model: the checkpoint.
        count: examples a task.
        normal: pictures that the normal decoder decodes too.
        seed: of the examples.
    """

    def __init__(self, model: LLaDAUni, count: int, normal: int, seed: int = 0):
        self.model, self.count, self.normal, self.seed = model, count, normal, seed

    def picture(self, tokens: ImageTokens, turbo: bool = True) -> Report:
        """What the decoded tokens show."""
        (image,) = self.model.decode(tokens, Decoding(turbo=turbo))
        return look(image.numpy())

    def encode(self, scenes: Iterable[Scene], purpose: str) -> ImageTokens:
        """Pictures of scenes as tokens, one by one: they may differ in size."""
        pixels = (torch.from_numpy(np.asarray(render(scene)).copy())[None] / 255 for scene in scenes)
        return join([self.model.encode(one, purpose) for one in pixels])

    def draw(
        self,
        thinking: bool = False,
        sprint: Sprint | None = None,
        guidance: Guidance | None = None,
        sampling: Sampling = SHORT,
        both: bool = False,
    ) -> Tally:
        """Text to image; `both` has the first pictures decoded by both decoders."""
        tally = Tally()
        for index, made in enumerate(examples("draw", self.count, self.seed)):
            scene = made.frames[-1][1]
            height, width = (side * 32 for side in scene.grid)
            options = {"thinking": thinking, "sprint": sprint, "guidance": guidance, "sampling": sampling}
            drawn = self.model.generate(made.instruction, height, width, **options)
            tally.usages.append(drawn.usage)
            report = self.picture(drawn.tokens)
            judge(tally, scene, report)
            if thinking:
                tally.add("plan right", read_scene(drawn.thinking) == (scene.things, scene.background))
            if both and index < self.normal:
                tally.add("turbo, of both", report.shows(scene))
                tally.add("normal, of both", self.picture(drawn.tokens, turbo=False).shows(scene))
        return tally

    def redraw(self) -> Tally:
        """True pictures through SigLIP-VQ and the decoders: what no backbone can do better than."""
        tally = Tally()
        for index, made in enumerate(examples("draw", self.count, self.seed)):
            scene = made.frames[-1][1]
            tokens = self.encode([scene], "edit")
            tally.add("turbo", self.picture(tokens).shows(scene))
            if index < self.normal:
                tally.add("normal", self.picture(tokens, turbo=False).shows(scene))
        return tally

    def questions(self, sprint: Sprint | None = None) -> Tally:
        """Questions about one or two pictures, by kind."""
        tally = Tally()
        for made in examples("understand", self.count, self.seed):
            tokens = self.encode(made.references, "understand")
            answer = self.model.answer(made.instruction, tokens, max_new_tokens=128, sprint=sprint)
            tally.usages.append(answer.usage)
            right = same_answer(answer.text, made.frames[0][0])
            tally.add("right", right)
            tally.add(made.kind, right)
        return tally

    def edits(
        self, sprint: Sprint | None = None, guidance: Guidance | None = None, sampling: Sampling | None = None
    ) -> Tally:
        """Edits of one picture, and with an object of a second one; the rest must stay."""
        tally = Tally()
        for made in examples("edit", self.count, self.seed):
            before, after = made.references[0], made.frames[-1][1]
            references = self.encode(made.references, "edit")
            options = {"references": references, "sprint": sprint, "guidance": guidance, "sampling": sampling}
            drawn = self.model.generate(made.instruction, **options)
            tally.usages.append(drawn.usage)
            report = self.picture(drawn.tokens)
            tally.add("right", report.shows(after))
            tally.add("rest kept", preserved(before, report, changed_places(before, after)))
            tally.add(made.kind, report.shows(after))
        return tally

    def stories(self) -> Tally:
        """Stories of two or three pictures: every picture and every text."""
        tally = Tally()
        for made in examples("story", max(1, self.count // 5), self.seed):
            told = self.model.interleave(made.instruction, 4, sampling=SHORT)
            tally.usages.append(told.usage)
            wanted = [scene for _, scene in made.frames if scene]
            grids = told.tokens.grids if told.tokens else ()
            tally.add("ended by itself", told.complete and len(grids) == len(wanted))
            tally.add("texts", all(text in told.text for text, _ in made.frames))
            for index, scene in enumerate(wanted):
                drawn = index < len(grids) and ImageTokens((grids[index],), self.model.codebook_size)
                tally.add("pictures", bool(drawn) and self.picture(drawn).shows(scene))
        return tally


def measurements(quality: Quality) -> dict[str, Callable[[], Tally]]:
    """Every row of the table, by name."""
    return {
        "redraw": quality.redraw,
        "draw, plain": lambda: quality.draw(both=True),
        "draw, every round": lambda: quality.draw(sampling=SCHEDULE),
        "draw, SPRINT": lambda: quality.draw(sprint=SPRINT),
        "draw, two rounds": lambda: quality.draw(sampling=HASTY),
        "draw, two rounds, SPRINT": lambda: quality.draw(sampling=HASTY, sprint=SPRINT),
        "draw, no guidance": lambda: quality.draw(guidance=Guidance(text=1.0)),
        "draw, thinking": lambda: quality.draw(thinking=True),
        "draw, thinking, SPRINT": lambda: quality.draw(thinking=True, sprint=SPRINT),
        "questions, plain": quality.questions,
        "questions, SPRINT": lambda: quality.questions(sprint=SPRINT),
        "edit, plain": quality.edits,
        "edit, SPRINT": lambda: quality.edits(sprint=SPRINT),
        "edit, SPRINT, whole pictures": lambda: quality.edits(sprint=WHOLE),
        "edit, two rounds": lambda: quality.edits(sampling=HASTY),
        "edit, two rounds, SPRINT": lambda: quality.edits(sampling=HASTY, sprint=SPRINT),
        "edit, no guidance": lambda: quality.edits(guidance=Guidance(text=0.0)),
        "stories, plain": quality.stories,
    }


def sides(options: argparse.Namespace) -> dict[str, Callable[[], Tally]]:
    """The rows of the world that the checkpoint has learnt."""
    model = opened(options.checkpoint, options.device, options.weights, torch.float32 if options.float32 else None)
    normal = options.count if options.normal is None else options.normal
    if options.world == "signs":
        return quality_signs.measurements(
            quality_signs.Quality(model, options.count, normal, options.seed, options.side, options.share)
        )
    return measurements(Quality(model, options.count, normal, options.seed))


def _share(text: str) -> tuple[int, int]:
    which, count = map(int, text.split("/"))
    if not 0 <= which < count:
        raise argparse.ArgumentTypeError(f"{text}: expected I/N, I from 0 to N - 1")
    return which, count


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--world", choices=WORLDS, default="shapes", help="that the checkpoint has learnt")
    parser.add_argument("--count", type=int, default=300, help="prompts a task (stories: a fifth)")
    parser.add_argument("--normal", type=int, help="pictures for the normal decoder; all by default")
    parser.add_argument("--side", type=int, default=16, help="prompts that are sampled side by side (signs)")
    parser.add_argument(
        "--share", type=_share, default=(0, 1), metavar="I/N", help="every N-th prompt from the I-th, from 0 (signs)"
    )
    parser.add_argument("--raw", type=Path, metavar="FILE", help="write all judgements there, for quality_table")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--float32", action="store_true", help="compute so, where bf16 is slow: on many CPUs")
    parser.add_argument("--weights", choices=WEIGHTS, default="as stored", help="bits that the backbone's weights have")
    parser.add_argument("--only", nargs="+", default=[""], metavar="ROW", help="only rows whose names begin so")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, as the card shows it")
    add_json(parser)
    options = parser.parse_args()
    if options.share != (0, 1) and options.world != "signs":
        parser.error(f"--share: found with --world {options.world}, expected signs; measure all prompts in one process")
    figures: dict[str, object] = {}
    form = "" if options.weights == "as stored" else f", weights {options.weights}"
    said = f"{options.count} held-out prompts a task{form}; per cent right, by pixels and texts."
    lines, raw = [], {}
    for name, measure in sides(options).items():
        if not name.startswith(tuple(options.only)):
            continue
        tally = measure()
        if not tally.right:  # a share of few prompts may have none of a row's
            continue
        head, _, (low, high) = score(tally)
        figures |= {f"{name}: {key}": value for key, value in tally.figures().items()}
        figures[f"{name}: {head}, 95 %"] = f"{low:.1f} to {high:.1f}"
        lines.append(row(name, tally))
        print(lines[-1], flush=True)
        raw[name + form] = tally.raw()
        if options.markdown:
            options.markdown.write_text(table(said, lines))
        if options.raw:
            options.raw.write_text(json.dumps(raw))
    show(f"The miniature on {options.count} held-out prompts a task{form}", figures, options.json)


if __name__ == "__main__":
    main()
