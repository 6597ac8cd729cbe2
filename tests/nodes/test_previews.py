"""What nodes show while they work, without a host's window: grids, throttling, texts."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llada_core.preview_colours import colours


@pytest.fixture(scope="module")
def host_package(in_process_host):
    """part -> the module nodes/host/<part>, as the pack was loaded."""
    package = in_process_host.node_class("LLaDAUniDecode").__module__.rpartition(".")[0]
    return lambda part: importlib.import_module(f"{package}.host.{part}")


class Clock:
    """Time that passes when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_previews_take_their_share_of_the_time_and_no_more(host_package):
    clock = Clock()
    throttle = host_package("previews").Throttle(share=0.01, clock=clock)
    drawn = []

    def draw():
        clock.now += 0.005
        drawn.append(clock.now)
        return "picture"

    for _ in range(10_000):
        throttle.run(draw)
        clock.now += 0.007
    assert drawn[0] == 0.005  # the first at once
    assert 0.008 < 0.005 * len(drawn) / clock.now <= 0.011


def test_a_grid_shows_colours_where_known_and_hatching_where_masked(host_package):
    codes = np.array([[0, -1], [1, 1]])
    palette = np.array([[255, 0, 0], [0, 0, 255]], dtype=np.uint8)
    picture = np.asarray(host_package("previews").draw_grid(codes, palette))
    assert picture.shape == (256, 256, 3)
    assert (picture[:128, :128] == [255, 0, 0]).all()
    assert (picture[128:] == [0, 0, 255]).all()
    masked = picture[:128, 128:]
    assert set(np.unique(masked)) == {44, 72}
    assert (masked[..., 0] == masked[..., 2]).all()  # grey


def test_colours_are_stable_use_the_whole_range_and_follow_the_features():
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(4, 64, generator=generator)
    features = (centres[:, None] + 0.01 * torch.randn(4, 32, 64, generator=generator)).flatten(0, 1)
    state = torch.random.get_rng_state()
    palette = colours(features)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(palette, colours(features.clone()))
    assert palette.min() == 0
    assert palette.max() == 255
    groups = palette.float().view(4, 32, 3)
    within = groups.std(1).mean()
    between = groups.mean(1).std(0).mean()
    assert between > 2 * within


@pytest.mark.parametrize("on", [False, True])
def test_nothing_is_drawn_unless_the_host_has_previews_on(host_package, monkeypatch, on):
    previews, progress = host_package("previews"), host_package("progress")
    method = previews.LatentPreviewMethod.Latent2RGB if on else previews.LatentPreviewMethod.NoPreviews
    monkeypatch.setattr(previews.args, "preview_method", method)
    asked = []
    reporter = progress.Reporter(None, SimpleNamespace(palette=lambda: torch.zeros(4, 3, dtype=torch.uint8)))
    token_preview = importlib.import_module("llada_core.progress").TokenPreview
    preview_type = getattr(previews, "TokenPreview", token_preview)

    def preview():
        asked.append(1)
        return preview_type(torch.zeros(2, 2, dtype=torch.int64))

    progress_type = progress.Progress
    reporter(progress_type(1, 8, "backbone", preview))
    assert len(asked) == on


def test_text_is_said_on_the_node_while_it_is_written(host_package, monkeypatch):
    progress = host_package("progress")
    said = []
    server = SimpleNamespace(client_id="c", send_progress_text=lambda text, node, client: said.append((text, node)))
    monkeypatch.setattr(progress, "PromptServer", SimpleNamespace(instance=server))
    reporter = progress.Reporter(SimpleNamespace(unique_id="7"), SimpleNamespace(palette=lambda: None))
    monkeypatch.setattr(reporter, "_texts", SimpleNamespace(run=lambda work, always: work()))
    reporter(progress.Progress(1, 64, "answer", lambda: ""))
    reporter(progress.Progress(2, 64, "answer", lambda: "A red fox"))
    reporter(progress.Progress(3, 64, "answer", lambda: "A red fox"))
    reporter(progress.Progress(4, 64, "answer", lambda: "A red fox in the snow."))
    reporter(progress.Progress(1, 8, "backbone"))
    assert said == [
        ("Answer round 1 of 64", "7"),
        ("A red fox", "7"),
        ("A red fox in the snow.", "7"),
        ("Backbone round 1 of 8", "7"),
    ]
