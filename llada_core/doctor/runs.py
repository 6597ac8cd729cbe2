"""The real thing, small: a drawing, an answer, and a picture there and back."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..backbone.experts import Router
from ..engine import LLaDAUni, OneDevice
from ..image_tokens import PATCH, ImageTokens
from ..options import Decoding, Guidance, Sampling
from .findings import Findings
from .picture import drawn_picture, likeness, looks_like_words, merged_order

PROMPT = "a large red circle to the left of a small blue square on a white background"
QUESTION = "Describe the picture."
ANSWER_TOKENS = 48
SIDE = 256  # pixels of the drawing
PIXELS = 0  # of the picture that is sent there and back; 0: the checkpoint's own budget
HIT, BALANCE = 0.5, 0.7  # of the experts; of the evenness of their load (1: all alike): less is worth a look
COLOUR, LAYOUT = 0.15, 0.6  # a picture that came back: at most so far in colour, at least so alike in layout


def examine_runs(model: LLaDAUni, manager: OneDevice, findings: Findings) -> None:
    """Everything that needs weights in memory."""
    with findings.part("drawing"):
        _draw(model, manager, findings)
    if "image_tokenizer" not in model.components:
        return
    picture = drawn_picture()
    with findings.part("answer"):
        _answer(model, picture, findings)
    with findings.part("reconstruction"):
        manager.release("backbone")
        _reconstruct(model, manager, picture, findings)


@contextmanager
def counted_experts(model: LLaDAUni, manager: OneDevice) -> Iterator[list[Counter]]:
    """Counts of the experts chosen inside, one Counter for each router of the backbone."""
    component = model.components["backbone"]
    module = manager.place("backbone", component, lambda dtype: 0).module
    routers = [part for part in module.modules() if isinstance(part, Router)]
    counts: list[Counter] = [Counter() for _ in routers]

    def count(index: int):
        return lambda module, inputs, chosen: counts[index].update(chosen[0].flatten().tolist())

    hooks = [router.register_forward_hook(count(index)) for index, router in enumerate(routers)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def evenness(counts: Counter, experts: int) -> float:
    """Entropy of the load over that of an even load, 0...1."""
    load = torch.tensor([float(counts[expert]) for expert in range(experts)])
    share = load / load.sum().clamp_min(1)
    return float(torch.special.entr(share).sum() / torch.log(torch.tensor(float(max(experts, 2)))))


def _draw(model: LLaDAUni, manager: OneDevice, findings: Findings) -> None:
    grids, told = {}, []
    with counted_experts(model, manager) as counts:
        for rescale in (0.0, 0.7):
            guidance = replace(Guidance(), rescale=rescale)
            drawn = model.generate(PROMPT, SIDE, SIDE, guidance=guidance, sampling=Sampling())
            grids[rescale] = drawn.tokens.grids[0]
            distinct = len(grids[rescale].unique())
            told.append(f"rescale {rescale:g}: {drawn.usage.rounds} rounds, {distinct} different codes")
    same = float((grids[0.0] == grids[0.7]).float().mean())
    findings.add("ok", "drawing", f"{'; '.join(told)}; {same:.0%} of the tokens agree; {drawn.usage.seconds:.1f} s")
    if min(len(grid.unique()) for grid in grids.values()) == 1:
        advice = "One code everywhere: the backbone does not predict. Compare its files with the release's."
        findings.add("wrong", "drawing", "a blank picture", advice)
    _routing(counts, model.config.num_experts, findings)


def _routing(counts: list[Counter], experts: int, findings: Findings) -> None:
    hit = [len(chosen) / experts for chosen in counts]
    even = [evenness(chosen, experts) for chosen in counts]
    found = f"{min(hit):.0%} to {max(hit):.0%} of {experts} experts hit a layer, load {min(even):.2f} even at least"
    if min(hit) < HIT or min(even) < BALANCE:
        advice = "A trained router spreads its tokens. Random or damaged router weights, or a bias that was lost?"
        findings.add("look", "routing", found, advice)
    else:
        findings.add("ok", "routing", found)


def _answer(model: LLaDAUni, picture: torch.Tensor, findings: Findings) -> None:
    tokens = model.encode(picture, "understand")
    answer = model.answer(QUESTION, tokens, max_new_tokens=ANSWER_TOKENS)
    short = answer.text[:60] + ("..." if len(answer.text) > 60 else "")
    if looks_like_words(answer.text):
        findings.add("ok", "answer", f"{short!r}, {answer.usage.seconds:.1f} s")
    else:
        advice = "No words: random weights, a tokenizer of another model, or a damaged backbone."
        findings.add("wrong", "answer", repr(short), advice)


def _reconstruct(model: LLaDAUni, manager: OneDevice, picture: torch.Tensor, findings: Findings) -> None:
    raster = model.encode(picture, "edit", pixels=PIXELS)
    height, width = raster.sizes[0]
    merged = _encode_merged(model, picture, height, width)
    parts = [part for part in ("decoder-turbo", "decoder") if part in model.components]
    if "vae" not in model.components or "sigvq" not in model.components:
        return
    for part in parts:
        decoding = Decoding(turbo=part == "decoder-turbo")
        began = time.perf_counter()
        seen = {}
        for order, tokens in (("raster", raster), ("merged 2x2", merged)):
            seen[order] = likeness(picture[0], model.decode(tokens, decoding)[0])
        seconds = (time.perf_counter() - began) / len(seen)
        manager.release(part)
        colour, layout = seen["raster"]
        told = f"raster patches: colour off {colour:.2f}, layout {layout:.2f} alike, {seconds:.1f} s; merged 2x2: "
        told += f"{seen['merged 2x2'][0]:.2f}, {seen['merged 2x2'][1]:.2f}"
        if seen["merged 2x2"][1] > layout + 0.1:
            advice = "Merged 2x2 comes back better than raster order, which this engine uses. Please report this."
            findings.add("wrong", part, told, advice)
        elif colour > COLOUR or layout < LAYOUT:
            advice = "The picture does not come back. Random or damaged weights, or parts of different models."
            findings.add("look", part, told, advice)
        else:
            findings.add("ok", part, told)


def _encode_merged(model: LLaDAUni, picture: torch.Tensor, height: int, width: int) -> ImageTokens:
    """The codes that patches handed over 2 x 2 at a time would get, each put back to its place."""
    order = merged_order(height, width)
    patches = _prepared(picture, height, width).unflatten(0, (height, PATCH)).unflatten(2, (width, PATCH))
    patches = patches.transpose(1, 2).flatten(0, 1)[order]  # [height * width, PATCH, PATCH, 3]
    shuffled = patches.unflatten(0, (height, width)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    codes = model.encode(shuffled[None], "edit", fit="crop", pixels=PIXELS).grids[0].flatten()
    back = torch.empty_like(codes).index_copy_(0, order, codes)
    return ImageTokens((back.view(height, width),), model.codebook_size)


def _prepared(picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The picture at the size that it is encoded at, float32 [16 height, 16 width, 3]."""
    size = (height * PATCH, width * PATCH)
    scaled = torch.nn.functional.interpolate(picture.movedim(-1, 1), size, mode="bilinear", antialias=True)
    return scaled[0].movedim(0, -1).clamp(0, 1)
