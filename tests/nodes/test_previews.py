"""What nodes show while they work, without a host's window: grids, throttling, texts."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dev.hosts.base_folder import ROOT
from dev.hosts.scenes import SECOND
from dev.miniature.world import render
from llada_core import LLaDAUni, OneDevice
from llada_core.decoder.decode import encode_picture
from llada_core.preview_colours import colours, latent_colours
from llada_core.vision.preprocess import to_pixels


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
    assert picture.shape == (64, 64, 3)  # the decoded picture's size, which the front end writes below it
    assert (picture[:32, :32] == [255, 0, 0]).all()
    assert (picture[32:] == [0, 0, 255]).all()
    masked = picture[:32, 32:]
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


def test_latents_have_the_colours_of_the_checkpoints_own_vae():
    """Shown by the map, a picture's latents look like the picture made small; by a wrong map they do not."""
    model = LLaDAUni(ROOT / "checkpoints" / "miniature", OneDevice("cpu", torch.float32))
    vae = model._place("vae")
    picture = to_pixels(render(SECOND).convert("RGB")).movedim(0, -1) / 255
    latents = encode_picture(vae.module, picture, vae.device, vae.dtype)
    small = picture.unflatten(1, (-1, 8)).unflatten(0, (-1, 8)).mean((1, 3))
    factors = model.latent_colours()
    assert model.latent_colours() is factors  # once
    wrong = factors.flip(0)
    near, far = ((latent_colours(latents, f).float() / 255 - small).abs().mean() for f in (factors, wrong))
    assert near < 0.1
    assert far > 2 * near


def test_the_end_stands_on_the_node_in_place_of_the_last_round(host_package, monkeypatch):
    progress, previews = host_package("progress"), host_package("previews")
    monkeypatch.setattr(previews.args, "preview_method", previews.LatentPreviewMethod.Latent2RGB)
    said, shown = [], []
    server = SimpleNamespace(client_id="c", send_progress_text=lambda text, node, client: said.append(text))
    monkeypatch.setattr(progress, "PromptServer", SimpleNamespace(instance=server))
    model = SimpleNamespace(palette=lambda: None, latent_colours=lambda: torch.zeros(17, 3))
    reporter = progress.Reporter(SimpleNamespace(unique_id="7"), model, latents=True)
    reporter(progress.Progress(3, 24, "decoder", lambda: torch.zeros(1, 16, 8, 12)))
    bar = reporter._bar
    monkeypatch.setattr(bar, "update_absolute", lambda done, total, picture: shown.append((done, total, picture)))
    reporter.finish("1 picture, 96x64, 8 steps, 0.1 s", torch.ones(64, 96, 3))
    assert said[-1] == "1 picture, 96x64, 8 steps, 0.1 s"
    ((done, total, (kind, picture, limit)),) = shown
    assert (done, total, kind, picture.size, limit) == (24, 24, "JPEG", (96, 64), None)
    assert picture.getpixel((5, 5)) == (255, 255, 255)


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
