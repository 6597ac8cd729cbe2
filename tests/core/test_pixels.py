"""decoder/pixels.py and decoder/transformer.py: pictures against the reference's, the cut forward against the
library's whole one, and files that do not fit. Then the working memory of every part but the backbone."""

import copy
import json
import logging
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llada_core.decoder.conditioning import open_embedder
from llada_core.decoder.flow import guide, normal_times, sample_normal, sample_turbo, turbo_times
from llada_core.decoder.pixels import (
    AXES_LENS,
    DECODER_FILES,
    VAE_FILE,
    VAE_TILE,
    check_grid,
    decode,
    decode_latents,
    decoder_working_bytes,
    open_decoder,
    open_vae,
    sample_latents,
    vae_dtype,
    vae_working_bytes,
)
from llada_core.errors import CheckpointError, InputError
from llada_core.options import Decoding
from llada_core.progress import Interrupted
from llada_core.vision.siglip_vq import build, encode_working_bytes, nearest_codes

CPU = torch.device("cpu")
WIDTH = 48  # of the golden checkpoint's features
RELEASED = {
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
FLUX_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


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
        conditioning, nothing = decoder.condition(features), decoder.condition(torch.zeros_like(features))

        def plain(x, t):
            return decoder.velocity(x, t, conditioning)

        def guided(x, t):
            return guide(plain(x, t), decoder.velocity(x, t, nothing), 1.0)

        x = golden_tensors[f"{key}.noise"]
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
    image = decode(decoders[case["decoder"]], embedder, vae, grid_of(case), decoding, CPU, torch.float32)
    assert image.dtype == torch.float32
    assert image.shape == (1, 32 * case["h"], 32 * case["w"], 3)
    assert distance(image.permute(0, 3, 1, 2), golden_tensors[f"{case['key']}.image"]) < 1e-4


# The cut forward


@pytest.mark.parametrize(("h", "w"), [(4, 4), (1, 1), (3, 5), (2, 8)])  # 64, 4, 60 and 64 positions: padded and not
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_both_halves_equal_the_librarys_forward(decoders, h, w, t):
    decoder = decoders["decoder"]
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(4 * h * w, WIDTH, generator=generator)
    x = torch.randn(1, 16, 1, 4 * h, 4 * w, generator=generator)
    with torch.no_grad():
        whole = decoder([x[0]], torch.tensor([t]), [features], return_dict=False)[0][0][None]
        halves = decoder.velocity(x, t, decoder.condition(features))
    assert halves.shape == x.shape
    assert halves.dtype == torch.float32
    assert torch.allclose(halves, whole, rtol=1e-4, atol=1e-5)


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

    hooks = [decoder.context_refiner[0].register_forward_hook(count("refiner"))]
    hooks.append(decoder.layers[0].register_forward_hook(count("layer")))
    sample_latents(decoder, embedder, some_grid(1, 1), decoding, 0, CPU, torch.float32)
    for hook in hooks:
        hook.remove()
    assert calls == {"refiner": refined, "layer": evaluated}


def test_guidance_changes_the_picture(decoders, embedder):
    def latents(guidance):
        decoding = Decoding(turbo=False, steps=4, guidance=guidance)
        return sample_latents(decoders["decoder"], embedder, some_grid(2, 2), decoding, 0, CPU, torch.float32)

    assert distance(latents(1.0), latents(0.0)) > 1e-3
    assert distance(latents(3.0), latents(1.0)) > 1e-3


@pytest.mark.parametrize("turbo", [True, False])
def test_latents_depend_on_the_seed_alone(decoders, embedder, turbo):
    decoding = Decoding(turbo=turbo, steps=2)

    def latents(seed):
        return sample_latents(decoders["decoder"], embedder, some_grid(2, 3), decoding, seed, CPU, torch.float32)

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
    exact = sample_latents(decoders[name], embedder, some_grid(4, 4), decoding, 0, CPU, torch.float32)
    near = sample_latents(half, codes, some_grid(4, 4), decoding, 0, CPU, torch.bfloat16)
    assert near.dtype == torch.float32
    assert 0 < distance(near, exact) < 0.05
    with torch.no_grad():
        v = half.velocity(torch.zeros(1, 16, 1, 4, 4), 0.5, half.condition(codes(some_grid(1, 1))))
    assert v.dtype == torch.float32
    picture = decode_latents(open_vae(golden_checkpoint / "vae").load(torch.bfloat16), near, CPU, torch.bfloat16)
    assert picture.dtype == torch.float32
    assert distance(picture, decode_latents(vae, exact, CPU, torch.float32)) < 0.05


def test_numbers_out_of_range_are_not_taken_for_a_picture(decoders, embedder):
    broken = copy.deepcopy(decoders["decoder"])
    broken.all_final_layer["2-1"].linear.bias[0] = float("inf")
    with pytest.raises(InputError, match=r"precision: found numbers beyond the range of torch\.float32.*bf16"):
        sample_latents(broken, embedder, some_grid(1, 1), Decoding(steps=2), 0, CPU, torch.float32)


def test_progress_runs_through_decoder_and_pixels(decoders, embedder, vae):
    seen = []

    def listen(progress):
        seen.append((progress.stage, progress.done, progress.total))
        if progress.preview:
            assert progress.preview().shape == (1, 16, 4, 8)

    grid, decoding = some_grid(1, 2), Decoding(steps=2)
    decode(decoders["decoder-turbo"], embedder, vae, grid, decoding, CPU, torch.float32, listen)
    assert seen == [("decoder", 1, 2), ("decoder", 2, 2), ("pixels", 1, 1)]


def test_a_listener_can_stop_it(decoders, embedder):
    seen = []

    def listen(progress):
        seen.append(progress.done)
        return progress.done < 2

    with pytest.raises(Interrupted):
        sample_latents(decoders["decoder"], embedder, some_grid(1, 1), Decoding(), 0, CPU, torch.float32, listen)
    assert seen == [1, 2]


# Size of the grid


@pytest.mark.parametrize(("h", "w"), [(1, 1), (32, 32), (64, 64), (16, 511), (512, 15), (93, 88)])
def test_grids_that_fit(h, w):
    check_grid(h, w)


@pytest.mark.parametrize(("h", "w"), [(513, 1), (1, 513), (91, 90), (93, 89)])
def test_grids_that_do_not_fit(decoders, embedder, h, w):
    with pytest.raises(InputError, match=f"tokens: found a grid of {h} x {w}"):
        sample_latents(decoders["decoder"], embedder, some_grid(h, w), Decoding(), 0, CPU, torch.float32)


# Opening


def test_the_files_configuration_is_overridden_and_its_names_translated(golden_checkpoint):
    component = open_decoder(golden_checkpoint / "decoder", WIDTH)
    config = component.module.config
    assert list(config["axes_lens"]) == list(AXES_LENS) == [32768, 1024, 1024]
    assert config["cap_feat_dim"] == WIDTH
    tensors = load_file(golden_checkpoint / "decoder" / DECODER_FILES[0])
    loaded = component.load(torch.float32)
    assert torch.equal(loaded.cap_embedder[1].weight, tensors["semantic_embedder.1.weight"])
    assert component.bytes(torch.float32) == sum(t.nbytes for t in tensors.values())


@pytest.fixture
def folder(checkpoint_copy) -> Path:
    return checkpoint_copy / "decoder"


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_the_mirrors_file_name_is_accepted(folder):
    (folder / "decoder_model.safetensors").rename(folder / "model.safetensors")
    assert open_decoder(folder, WIDTH).slots


def test_unknown_fields_are_named_in_one_line(folder, caplog):
    caplog.set_level(logging.INFO)
    edit(folder / "config.json", semantic_dim=4096, scheduler="x")
    open_decoder(folder, WIDTH)
    lines = [record.getMessage() for record in caplog.records if "semantic_dim" in record.getMessage()]
    assert len(lines) == 1
    assert "scheduler" in lines[0]
    assert "_class_name" not in lines[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"dim": None},
        {"dim": "64"},
        {"n_layers": 0},
        {"n_layers": True},
        {"in_channels": -16},
        {"n_heads": 3},
        {"axes_dims": [8, 8, 8]},
        {"all_patch_size": [4]},
        {"all_patch_size": [2, 4], "all_f_patch_size": [1, 1]},
        {"all_f_patch_size": [2]},
        {"all_patch_size": 2},
    ],
)
def test_decoder_configurations_that_are_refused(folder, fields):
    edit(folder / "config.json", **fields)
    with pytest.raises(CheckpointError, match=r"decoder: config\.json"):
        open_decoder(folder, WIDTH)


def test_missing_decoder_files_are_refused(folder):
    (folder / DECODER_FILES[0]).unlink()
    with pytest.raises(CheckpointError, match=r"decoder: decoder_model\.safetensors: found no such file"):
        open_decoder(folder, WIDTH)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"decoder: config\.json: found no such file"):
        open_decoder(folder, WIDTH)


@pytest.mark.parametrize("kept", [0, 100, -64])
def test_a_truncated_decoder_file_is_refused(folder, kept):
    path = folder / DECODER_FILES[0]
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"decoder_model\.safetensors.*unreadable"):
        open_decoder(folder, WIDTH)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("layers.1.attention.to_q.weight"), r"layers\.1\.attention\.to_q\.weight"),
        (lambda t: t.pop("semantic_embedder.1.bias"), r"cap_embedder\.1\.bias"),
        (lambda t: t.update(x_pad_token=torch.zeros(1, 65)), r"x_pad_token of shape \[1, 65\]"),
        (lambda t: t.update(extra=torch.zeros(1)), "the unknown tensor extra"),
    ],
)
def test_decoder_files_of_another_model_are_refused(folder, change, named):
    rewrite(folder / DECODER_FILES[0], change)
    with pytest.raises(CheckpointError, match=named):
        open_decoder(folder, WIDTH)


def test_features_of_another_width_are_refused(folder):
    with pytest.raises(CheckpointError, match=r"semantic_embedder\.\d\.weight of shape"):
        open_decoder(folder, WIDTH + 1)


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


@pytest.mark.parametrize("name", ["config.json", VAE_FILE])
def test_a_missing_vae_is_refused(checkpoint_copy, name):
    (checkpoint_copy / "vae" / name).unlink()
    with pytest.raises(CheckpointError, match=f"vae: {name}: found no such file"):
        open_vae(checkpoint_copy / "vae")


@pytest.mark.parametrize(
    "fields",
    [
        {"latent_channels": None},
        {"scaling_factor": None},
        {
            "block_out_channels": [16] * 3,
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
        },
        {"block_out_channels": 16},
        {"up_block_types": ["NoSuchBlock"] * 4},
    ],
)
def test_vae_configurations_that_are_refused(checkpoint_copy, fields):
    edit(checkpoint_copy / "vae" / "config.json", **fields)
    with pytest.raises(CheckpointError, match=r"vae: config\.json"):
        open_vae(checkpoint_copy / "vae")


def test_a_vae_of_another_shape_is_refused(checkpoint_copy):
    rewrite(checkpoint_copy / "vae" / VAE_FILE, lambda t: t.update({"decoder.conv_out.bias": torch.zeros(4)}))
    with pytest.raises(CheckpointError, match=r"decoder\.conv_out\.bias of shape \[4\]"):
        open_vae(checkpoint_copy / "vae")


# Memory


@pytest.fixture(scope="module")
def released():
    """The released decoder with two of its layers (a peak does not depend on their number), without weights."""
    from llada_core.decoder.transformer import SemanticDecoder

    with torch.device("meta"):
        return SemanticDecoder(**RELEASED | {"n_layers": 2, "cap_feat_dim": 4096, "axes_lens": list(AXES_LENS)})


@pytest.fixture(scope="module")
def released_vae():
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL(**FLUX_VAE)


def test_released_parts_take_the_memory_the_contract_says(released_vae):
    from llada_core.decoder.transformer import SemanticDecoder

    with torch.device("meta"):
        whole = SemanticDecoder(**RELEASED | {"cap_feat_dim": 4096, "axes_lens": list(AXES_LENS)})
    assert 2 * sum(p.numel() for p in whole.parameters()) == pytest.approx(12.3e9, rel=0.01)
    assert 2 * sum(p.numel() for p in released_vae.parameters()) == pytest.approx(168e6, rel=0.01)


def test_rotary_tables_are_small_and_reach_the_largest_grid(released):
    embed = copy.deepcopy(released.rope_embedder)
    most = AXES_LENS[0] - 32  # conditioning vectors of the largest grid
    assert embed(torch.tensor([[most + 1, 1023, 1023]])).shape == (1, 64)
    assert sum(table.nbytes for table in embed.freqs_cis) < 5 * 2**20
    assert {table.device.type for table in embed.freqs_cis} == {"cpu"}


class Peak(TorchDispatchMode):
    """The most bytes alive at once of what is made while this is active; the module's own weights do not count."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.known = {p.untyped_storage()._cdata for p in module.parameters()}
        self.alive = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.bytes = max(self.bytes, self.alive)
        return out

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


@pytest.fixture
def fused_attention(monkeypatch):
    """On the meta device attention would be measured unfused."""
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda query, *_, **__: torch.empty_like(query)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("h", "w"), [(8, 8), (32, 32), (17, 45)])
@pytest.mark.usefixtures("fused_attention")
def test_decoder_working_bytes_bound_the_peak_closely(released, h, w, dtype):
    model = copy.deepcopy(released).to(dtype)
    with torch.no_grad(), Peak(model) as peak:
        features = torch.empty(4 * h * w, 4096, dtype=dtype, device="meta")
        conditioning, nothing = model.condition(features), model.condition(torch.zeros_like(features))
        del features
        x = torch.empty(1, 16, 1, 4 * h, 4 * w, dtype=torch.float64, device="meta")
        v = model.velocity(x, 0.5, conditioning)
        x = x + guide(v, model.velocity(x, 0.5, nothing), 1.0)
    stated = decoder_working_bytes(h, w, dtype, released.config)
    assert peak.bytes <= stated
    if h * w > 256:
        assert stated < 1.15 * peak.bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("h", "w"), [(8, 8), (32, 32), (17, 45)])
@pytest.mark.usefixtures("fused_attention")
def test_vae_working_bytes_leave_as_much_again_for_convolutions(released_vae, h, w, dtype):
    model = copy.deepcopy(released_vae).to(vae_dtype(dtype))
    with torch.no_grad(), Peak(model) as peak:
        model.decode(torch.empty(1, 16, 4 * h, 4 * w, dtype=vae_dtype(dtype), device="meta"))
    stated = vae_working_bytes(h, w, dtype, released_vae.config)
    assert 1.9 * peak.bytes < stated
    if h * w > 256:
        assert stated < 2.2 * peak.bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("h", "w"), [(8, 8), (32, 32), (50, 50), (40, 100)])
@pytest.mark.usefixtures("fused_attention")
def test_encode_working_bytes_bound_the_peak(h, w, dtype):
    vision = {"depth": 2, "hidden_size": 1536, "image_size": 2048, "in_channels": 3, "intermediate_size": 6144}
    vq = {"embed_dim": 2048, "latent_channels": 1536, "num_embeddings": 16384}
    vision |= {"num_heads": 16, "patch_size": 16}
    model = build({"vision_config": vision, "vq_config": vq}).to(dtype)
    codebook = model.vqmodel.quantize.embedding.weight
    with torch.no_grad(), Peak(model) as tower:
        model._features(torch.empty(h * w, 3, 16, 16, dtype=dtype, device="meta"), h, w)
    with torch.no_grad(), Peak(model) as search:
        nearest_codes(torch.empty(h * w, 2048, dtype=dtype, device="meta"), codebook)
    peak = max(tower.bytes, search.bytes)
    assert search.bytes < 160e6  # 2,500 tokens against 16,384 codes at once would be more
    copies = 16384 * 1536 * (4 + dtype.itemsize)  # of the positions, where the host keeps them elsewhere
    assert peak <= encode_working_bytes(h * w * 16**2, dtype, model.config) < 1.6 * peak + copies


def test_importing_the_engines_ends_does_not_import_the_libraries():
    code = (
        "import sys, llada_core.decoder.pixels, llada_core.decoder.conditioning, llada_core.vision.siglip_vq\n"
        "print([name for name in ('diffusers', 'transformers') if name in sys.modules])"
    )
    root = Path(sys.modules[decode.__module__].__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
