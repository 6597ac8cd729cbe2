"""Reports of long work: their order, totals and previews, and how they stop it."""

import pytest
import torch

from llada_core.engine import LLaDAUni
from llada_core.image_tokens import ImageTokens
from llada_core.options import Decoding, Guidance, Sampling
from llada_core.progress import Interrupted, Progress, TokenPreview

SAMPLING = Sampling(steps=3, thinking_steps=2, thinking_length=40, threshold=1.0)
TOKENS = ImageTokens((torch.arange(4).view(2, 2), torch.arange(6).view(2, 3)), 256)
IMAGES = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))

# Each kind of work and the stages that it passes through.
WORK = {
    "draw": (lambda m, p: m.generate("fox", 160, 256, sampling=SAMPLING, progress=p), ["backbone"]),
    "edit": (lambda m, p: m.generate("blue", references=TOKENS, sampling=SAMPLING, progress=p), ["backbone"]),
    "think": (
        lambda m, p: m.generate("fox", 64, 64, thinking=True, sampling=SAMPLING, progress=p),
        ["thinking", "backbone"],
    ),
    "answer": (lambda m, p: m.answer("What?", TOKENS, max_new_tokens=40, sampling=SAMPLING, progress=p), ["answer"]),
    "encode": (lambda m, p: m.encode(IMAGES, "understand", progress=p), ["encode"]),
    "decode": (lambda m, p: m.decode(TOKENS, Decoding(steps=3), p), ["decoder", "pixels"]),
    "decode normally": (lambda m, p: m.decode(TOKENS, Decoding(turbo=False, steps=3), p), ["decoder", "pixels"]),
}


@pytest.mark.parametrize("name", WORK)
def test_reports_rise_to_their_total_stage_by_stage(name, model):
    work, stages = WORK[name]
    reports: list[Progress] = []
    work(model, lambda progress: reports.append(progress))
    assert list(dict.fromkeys(report.stage for report in reports)) == stages
    for stage in stages:
        done = [report.done for report in reports if report.stage == stage]
        (total,) = {report.total for report in reports if report.stage == stage}
        assert done == sorted(done)
        assert done[-1] == total
        assert len(done) > 2


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("at", [1, 2, 4])
def test_false_stops_at_once(name, at, model):
    """The report that answers False is the last: no further round is run, whatever the stage."""
    work, _ = WORK[name]
    expected: list[Progress] = []
    work(model, lambda progress: expected.append(progress))
    reports: list[Progress] = []

    def stop(progress: Progress) -> bool:
        reports.append(progress)
        return len(reports) < min(at, len(expected))

    with pytest.raises(Interrupted, match=r"stopped at \w+ round \d+ of \d+"):
        work(model, stop)
    assert [(r.stage, r.done) for r in reports] == [(r.stage, r.done) for r in expected[: len(reports)]]
    assert len(reports) == min(at, len(expected))


@pytest.mark.parametrize("name", WORK)
def test_an_exception_passes_through_and_the_engine_still_works(name, model):
    work, _ = WORK[name]

    class HostInterrupt(Exception):
        pass

    def fail(progress):
        raise HostInterrupt

    def run():
        result = work(model, None)
        return getattr(result, "tokens", getattr(result, "text", result))

    def grids(result):
        return list(result.grids) if isinstance(result, ImageTokens) else result

    before = run()
    with pytest.raises(HostInterrupt):
        work(model, fail)
    for left, right in zip(grids(before), grids(run()), strict=True):
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def test_no_round_runs_between_a_stop_and_the_end(golden_checkpoint):
    """Counted in the network itself: one report before the first round, one after each."""
    engine = LLaDAUni(golden_checkpoint)
    backbone, calls, reports = engine._place("backbone").module, [], []
    backbone.register_forward_hook(lambda *_: calls.append(1))

    def stop(progress: Progress) -> bool:
        reports.append(progress)
        return len(reports) <= 3

    with pytest.raises(Interrupted):
        engine.generate("fox", 256, 256, sampling=SAMPLING, progress=stop)
    assert len(calls) == 3


# Previews


def test_token_previews_fill_up_to_the_final_tokens(model):
    previews: list[TokenPreview] = []

    def look(progress: Progress) -> None:
        if progress.preview:
            previews.append(progress.preview())

    drawn = model.generate("fox", 160, 256, sampling=SAMPLING, guidance=Guidance(2.0), progress=look)
    (final,) = drawn.tokens.grids
    assert torch.equal(previews[-1].codes, final)
    open_before = final.numel() + 1
    for preview in previews:
        known = preview.codes >= 0
        assert preview.codes.shape == final.shape
        assert bool((preview.codes[~known] == -1).all())
        assert torch.equal(preview.codes[known], final[known]), "a token once shown never changes"
        still_open = int((~known).sum())
        assert still_open <= open_before
        open_before = still_open
    assert open_before == 0
    assert int((previews[0].codes < 0).sum()) > 0


def test_text_previews_grow_to_the_answer(model):
    texts: list[str] = []

    def look(progress: Progress) -> None:
        if progress.preview:
            texts.append(progress.preview())

    answer = model.answer("What?", TOKENS, max_new_tokens=70, sampling=SAMPLING, progress=look)
    assert texts[-1].strip() == answer.text
    assert len(texts[0]) < len(texts[-1])


@pytest.mark.parametrize("name", WORK)
def test_the_engine_itself_never_builds_a_preview(name, model, monkeypatch):
    """A listener without previews pays nothing: no image is turned to text or codes for it."""
    work, _ = WORK[name]
    monkeypatch.setattr(
        "llada_core.sampling.pipeline.TokenPreview", lambda codes: pytest.fail("a preview was built for nobody")
    )
    seen = []
    work(model, lambda progress: seen.append(progress.preview))
    assert all(preview is None or callable(preview) for preview in seen)
