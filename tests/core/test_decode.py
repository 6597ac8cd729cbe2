"""decoder/pixels.py and decoder/transformer.py: pictures against the reference's, and the cut forward against the
library's whole one."""

import copy

import pytest
import torch

from llada_core.decoder.conditioning import open_embedder
from llada_core.decoder.decode import (
    VAE_TILE,
    check_grid,
    decode_latents,
    open_decoder,
    open_vae,
    sample_latents,
    vae_dtype,
)
from llada_core.decoder.flow import guide, normal_times, sample_normal, sample_turbo, turbo_times
from llada_core.errors import CheckpointError, InputError
from llada_core.options import Decoding
from llada_core.progress import Interrupted

CPU = torch.device("cpu")
WIDTH = 48  # of the golden checkpoint's features


@pytest.fixture(scope="module")
def embedder(golden_checkpoint):
    return open_embedder(golden_checkpoint / "image_tokenizer").load(torch.float32)


@pytest.fixture(scope="module")
def decoders(golden_checkpoint) -> dict:
    names = ("decoder", "decoder-turbo")
    return {name: open_decoder(golden_checkpoint / name, WIDTH).load(torch.float32) for name in names}


@pytest.fixture(scope="module")
def vae(golden_checkpoint):
    return open_vae(golden_checkpoint / "vae").load(torch.float32)


def grid_of(case) -> torch.Tensor:
    return torch.tensor(case["token_ids"]).view(case["h"], case["w"])


def latents_of(decoder, embedder, grid, *rest) -> torch.Tensor:
    """Codes to latents: the embedder, then the decoder."""
    return sample_latents(decoder, embedder(grid), tuple(grid.shape), *rest)


def decode(decoder, embedder, vae, grid, decoding, progress=None) -> torch.Tensor:
    """Codes to a picture [1, H, W, 3], both steps."""
    latents = latents_of(decoder, embedder, grid, decoding, decoding.seed, CPU, torch.float32, progress)
    return decode_latents(vae, latents, CPU, torch.float32)


def some_grid(h: int, w: int) -> torch.Tensor:
    return torch.randint(0, 256, (h, w), generator=torch.Generator().manual_seed(h * 100 + w))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# Against the reference


@pytest.mark.parametrize("index", range(5))
def test_latents_and_pictures_are_those_of_the_reference(index, golden, golden_tensors, decoders, embedder, vae):
    case = golden["decode"][index]
    key, decoder = case["key"], decoders[case["decoder"]]
    with torch.no_grad():
        features = embedder(grid_of(case))
        x = golden_tensors[f"{key}.noise"]
        conditionings = [decoder.condition(f, x.shape[-2:]) for f in (features, torch.zeros_like(features))]

        def plain(x, t):
            return decoder.velocity(x, t, conditionings[0])

        def guided(x, t):
            return guide(*decoder.velocities(x, t, conditionings), 1.0)

        if case["decoder"] == "decoder-turbo":
            x = sample_turbo(plain, x, turbo_times(case["steps"]), iter(golden_tensors[f"{key}.renoise"]))
        else:
            x = sample_normal(guided, x, normal_times(case["steps"]))
    assert distance(x[:, :, 0], golden_tensors[f"{key}.latents"]) < 1e-4
    image = decode_latents(vae, x[:, :, 0], CPU, torch.float32)
    assert distance(image.permute(0, 3, 1, 2), golden_tensors[f"{key}.image"]) < 1e-4


@pytest.mark.parametrize("index", range(3))
def test_seeded_pictures_are_those_of_the_reference(index, golden, golden_tensors, decoders, embedder, vae):
    case = golden["decode_seeded"][index]
    decoding = Decoding(turbo=case["decoder"] == "decoder-turbo", steps=case["steps"], seed=case["seed"])
    torch.manual_seed(0)  # of no consequence
    image = decode(decoders[case["decoder"]], embedder, vae, grid_of(case), decoding)
    assert image.dtype == torch.float32
    assert image.shape == (1, 32 * case["h"], 32 * case["w"], 3)
    assert distance(image.permute(0, 3, 1, 2), golden_tensors[f"{case['key']}.image"]) < 1e-4


# What is computed how often


@pytest.mark.parametrize(
    ("decoding", "refined", "evaluated"),
    [
        (Decoding(turbo=True, steps=3), 1, 3),
        (Decoding(turbo=True), 1, 8),
        (Decoding(turbo=False, steps=4), 2, 6),
        (Decoding(turbo=False, steps=4, guidance=0), 1, 3),
        (Decoding(turbo=False), 2, 98),
    ],
)
def test_the_conditioning_is_prepared_once_a_picture(decoders, embedder, decoding, refined, evaluated):
    decoder = decoders["decoder"]
    calls = {"refiner": 0, "layer": 0}

    def count(name):
        return lambda *_: calls.update({name: calls[name] + 1})

    hooks = [decoder.context_refiner[0].feed_forward.w1.register_forward_hook(count("refiner"))]
    hooks.append(decoder.layers[0].feed_forward.w1.register_forward_hook(count("layer")))
    latents_of(decoder, embedder, some_grid(1, 1), decoding, 0, CPU, torch.float32)
    for hook in hooks:
        hook.remove()
    assert calls == {"refiner": refined, "layer": evaluated}


def test_guidance_changes_the_picture(decoders, embedder):
    def latents(guidance):
        decoding = Decoding(turbo=False, steps=4, guidance=guidance)
        return latents_of(decoders["decoder"], embedder, some_grid(2, 2), decoding, 0, CPU, torch.float32)

    assert distance(latents(1.0), latents(0.0)) > 1e-3
    assert distance(latents(3.0), latents(1.0)) > 1e-3


@pytest.mark.parametrize("turbo", [True, False])
def test_latents_depend_on_the_seed_alone(decoders, embedder, turbo):
    decoding = Decoding(turbo=turbo, steps=2)

    def latents(seed):
        return latents_of(decoders["decoder"], embedder, some_grid(2, 3), decoding, seed, CPU, torch.float32)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = latents(5)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.shape == (1, 16, 8, 12)
    assert first.dtype == torch.float32
    torch.manual_seed(2)
    assert torch.equal(latents(5), first)
    assert distance(latents(6), first) > 0.1


@pytest.mark.parametrize("turbo", [True, False])
def test_bfloat16_comes_near_float32(golden_checkpoint, decoders, embedder, vae, turbo):
    name = "decoder-turbo" if turbo else "decoder"
    half = open_decoder(golden_checkpoint / name, WIDTH).load(torch.bfloat16)
    codes = open_embedder(golden_checkpoint / "image_tokenizer").load(torch.bfloat16)
    decoding = Decoding(turbo=turbo, steps=4)
    exact = latents_of(decoders[name], embedder, some_grid(4, 4), decoding, 0, CPU, torch.float32)
    near = latents_of(half, codes, some_grid(4, 4), decoding, 0, CPU, torch.bfloat16)
    assert near.dtype == torch.float32
    assert 0 < distance(near, exact) < 0.05
    with torch.no_grad():
        v = half.velocity(torch.zeros(1, 16, 1, 4, 4), 0.5, half.condition(codes(some_grid(1, 1)), (4, 4)))
    assert v.dtype == torch.float32
    picture = decode_latents(open_vae(golden_checkpoint / "vae").load(torch.bfloat16), near, CPU, torch.bfloat16)
    assert picture.dtype == torch.float32
    assert distance(picture, decode_latents(vae, exact, CPU, torch.float32)) < 0.05


@pytest.mark.parametrize("turbo", [True, False])
def test_a_weight_that_is_no_number_is_named_within_a_round(decoders, embedder, turbo):
    broken = copy.deepcopy(decoders["decoder"])
    broken.all_final_layer["2-1"].linear.bias[0] = float("inf")
    rounds = []
    with pytest.raises(CheckpointError, match=r"all_final_layer\.2-1\.linear\.bias: found 1 numbers that are NaN"):
        latents_of(broken, embedder, some_grid(1, 1), Decoding(turbo, 9), 0, CPU, torch.float32, rounds.append)
    assert len(rounds) == 1


@pytest.mark.parametrize("steps", [1, 9])
def test_numbers_out_of_range_are_not_taken_for_a_picture(decoders, embedder, steps):
    broken = copy.deepcopy(decoders["decoder-turbo"])
    broken.all_final_layer["2-1"].linear.weight.fill_(3e38)
    with pytest.raises(InputError, match=r"precision: found latents beyond the range of torch\.float32, from finite"):
        latents_of(broken, embedder, some_grid(1, 1), Decoding(steps=steps), 0, CPU, torch.float32)


def test_progress_shows_every_round_and_the_latents_so_far(decoders, embedder, vae):
    seen = []

    def listen(progress):
        seen.append((progress.stage, progress.done, progress.total))
        if progress.preview:
            assert progress.preview().shape == (1, 16, 4, 8)

    grid, decoding = some_grid(1, 2), Decoding(steps=2)
    decode(decoders["decoder-turbo"], embedder, vae, grid, decoding, listen)
    assert seen == [("decoder", 1, 2), ("decoder", 2, 2)]


def test_a_listener_can_stop_it(decoders, embedder):
    seen = []

    def listen(progress):
        seen.append(progress.done)
        return progress.done < 2

    with pytest.raises(Interrupted):
        latents_of(decoders["decoder"], embedder, some_grid(1, 1), Decoding(), 0, CPU, torch.float32, listen)
    assert seen == [1, 2]


# Size of the grid


@pytest.mark.parametrize(("h", "w"), [(1, 1), (32, 32), (64, 64), (16, 511), (512, 15), (93, 88)])
def test_grids_that_fit(h, w):
    check_grid(h, w)


@pytest.mark.parametrize(("h", "w"), [(513, 1), (1, 513), (91, 90), (93, 89)])
def test_grids_that_do_not_fit(decoders, embedder, h, w):
    with pytest.raises(InputError, match=f"tokens: found a grid of {h} x {w}"):
        latents_of(decoders["decoder"], embedder, some_grid(h, w), Decoding(), 0, CPU, torch.float32)


# VAE


def test_latents_are_unscaled_before_and_values_mapped_after(vae, monkeypatch):
    seen = []

    def stand_in(z, return_dict):
        seen.append(z)
        return (torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5),)

    monkeypatch.setattr(vae, "decode", stand_in)
    image = decode_latents(vae, torch.full((1, 16, 1, 5), 0.3611), CPU, torch.float32)
    assert torch.allclose(seen[0], torch.full((1, 16, 1, 5), 1.1159))
    assert image.shape == (1, 1, 5, 3)
    assert image[0, 0, :, 2].tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (16, 8, 8), (1, 16, 1, 8, 8)])
def test_latents_of_another_model_are_refused(vae, shape):
    with pytest.raises(InputError, match="latents: found"):
        decode_latents(vae, torch.zeros(shape), CPU, torch.float32)


def test_float16_decodes_in_float32(vae):
    assert vae_dtype(torch.float16) == torch.float32
    assert vae_dtype(torch.bfloat16) == torch.bfloat16
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    half, full = (decode_latents(vae, latents, CPU, dtype) for dtype in (torch.float16, torch.float32))
    assert torch.equal(half, full)


def test_where_memory_runs_out_it_decodes_in_tiles(golden_checkpoint, caplog):
    vae = open_vae(golden_checkpoint / "vae").load(torch.float32)
    latents = torch.randn(1, 16, 8, VAE_TILE + 40, generator=torch.Generator().manual_seed(0))
    before = vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size
    whole, sizes = vae.decoder.forward, []

    def small_memory(z, *rest):
        sizes.append(z.shape[-1])
        if z.shape[-1] > VAE_TILE:
            raise torch.OutOfMemoryError("too large")
        return whole(z, *rest)

    vae.decoder.forward = small_memory
    image = decode_latents(vae, latents, CPU, torch.float32)
    vae.decoder.forward = whole
    assert len([record for record in caplog.records if "tiles of 512" in record.getMessage()]) == 1
    assert sizes[0] == VAE_TILE + 40
    assert sizes[1:] == [VAE_TILE, VAE_TILE + 40 - 48, 8]
    assert (vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size) == before
    direct = decode_latents(vae, latents, CPU, torch.float32)
    assert image.shape == direct.shape
    assert distance(image, direct) < 0.1


def test_memory_that_never_suffices_is_an_error_and_leaves_no_trace(golden_checkpoint):
    vae = open_vae(golden_checkpoint / "vae").load(torch.float32)

    def no_memory(*_):
        raise torch.OutOfMemoryError("none at all")

    vae.decoder.forward = no_memory
    with pytest.raises(torch.OutOfMemoryError):
        decode_latents(vae, torch.zeros(1, 16, 8, 8), CPU, torch.float32)
    assert not vae.use_tiling
