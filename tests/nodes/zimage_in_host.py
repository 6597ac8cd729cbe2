"""Run by test_zimage.py inside a real ComfyUI's own modules: the decoder as the host's Z-Image against the engine's.

Usage: python zimage_in_host.py <ComfyUI folder> <checkpoint> <work folder> --cpu. Prints a JSON object of relative
differences (`apart`) and other findings.
"""

import gc
import importlib
import json
import weakref
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from zimage_tools import (
    CHECKPOINT,
    FILE,
    SEED,
    SETTINGS,
    WORK,
    apart,
    draw,
    front,
    image_tokens,
    load,
    load_from,
    native,
    open_model,
    pack,
    tokens_of,
    zimage,
)

samplers = importlib.import_module("comfy.samplers")
management = importlib.import_module("comfy.model_management")
custom = importlib.import_module("comfy_extras.nodes_custom_sampler")
options, formats, form = (
    pack(f"llada_core.{name}") for name in ("options", "quantization.formats", "decoder.zimage_form")
)
VAE_FILE = "diffusion_pytorch_model.safetensors"
FLUX_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 16,
    "layers_per_block": 2,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
report: dict = {}


def evaluations(model) -> None:
    """One evaluation at a time: the host's output at sigma = 1 - t is minus the velocity."""
    worst = 0.0
    for kind, part in (("turbo", "decoder-turbo"), ("normal", "decoder")):
        ours = model.components[part].load(torch.float32)
        theirs = native.DecoderModel.execute(model, kind).result[0].model.diffusion_model
        for h, w in ((1, 1), (2, 2), (3, 5), (4, 3), (7, 1)):
            generator = torch.Generator().manual_seed(h * w)
            features = torch.randn(4 * h * w, ours.config.cap_feat_dim, generator=generator)
            x = torch.randn(1, 16, 1, 4 * h, 4 * w, generator=generator)
            for t in (0.0, 0.3, 0.875):
                expected = ours.velocity(x, t, ours.condition(features, x.shape[-2:]))[:, :, 0]
                found = theirs(x[:, :, 0], torch.tensor([1 - t]), features[None], features.shape[0])
                worst = max(worst, apart(-found, expected))
    report["evaluation"] = worst


def pictures(model) -> None:
    """What KSampler and SamplerCustom draw, against Decode."""
    tokens = tokens_of(model, (3, 2))
    for kind, (steps, cfg, sampler) in SETTINGS.items():
        decoder, vae = load(model, kind)
        expected = model.decode(tokens, options.Decoding(turbo=kind == "turbo", seed=SEED))
        latents = draw(model, decoder, tokens, kind)
        report[f"KSampler, {kind}"] = apart(vae.decode(latents)[0], expected[0])
        report[f"another seed, {kind}"] = apart(vae.decode(draw(model, decoder, tokens, kind, 8))[0], expected[0])
        positive, negative, latent, *_ = native.TokensToConditioning.execute(model, tokens).result
        for count in (0, 5):
            asked = count + (kind == "normal") if count else 0  # Decode counts both ends
            levels = native.DecoderSchedule.execute(decoder, count, 1.0).result[0]
            drawn = custom.SamplerCustom.execute(
                decoder, True, SEED, cfg, positive, negative, samplers.sampler_object(sampler), levels, latent
            )
            expected = model.decode(tokens, options.Decoding(turbo=kind == "turbo", seed=SEED, steps=asked))
            found = vae.decode(drawn.result[0]["samples"])[0]
            report[f"SamplerCustom, {kind}, {count or 'own'} steps"] = apart(found, expected[0])
        report[f"levels, {kind}"] = native.DecoderSchedule.execute(decoder, 0, 1.0).result[0].tolist()
        simple = samplers.calculate_sigmas(decoder.get_model_object("model_sampling"), "simple", steps)
        report[f"simple, {kind}"] = simple.tolist()
    part = native.DecoderSchedule.execute(decoder, 10, 0.5).result[0]
    whole = native.DecoderSchedule.execute(decoder, 20, 1.0).result[0]
    report["half of the way is the last half"] = torch.allclose(part, whole[10:])
    report["no denoising has no levels"] = len(native.DecoderSchedule.execute(decoder, 10, 0.0).result[0])


def batches(model) -> None:
    """Two grids in a batch: the first is Decode's; the second's noise is the host's, but its guidance its own."""
    both = tokens_of(model, (3, 2), (3, 2))
    for kind in SETTINGS:
        decoder, vae = load(model, kind)
        found = vae.decode(draw(model, decoder, both, kind))
        expected = model.decode(both, options.Decoding(turbo=kind == "turbo", seed=SEED))
        report[f"first of a batch, {kind}"] = apart(found[0], expected[0])
        alone = image_tokens.ImageTokens(both.grids[1:], both.codebook_size)
        report[f"second of a batch, {kind}"] = apart(found[1], vae.decode(draw(model, decoder, alone, kind))[0])
    kept = samplers.sampler_object("lcm")
    positive, negative, latent, *_ = native.TokensToConditioning.execute(model, both).result
    decoder, _ = load(model, "turbo")
    levels = native.DecoderSchedule.execute(decoder, 2, 1.0).result[0]
    custom.SamplerCustom.execute(decoder, True, SEED, 1.0, positive, negative, kept, levels, latent)
    report["the sampler as it was"] = kept.extra_options == {}


def guidance(model) -> None:
    """cfg 1 is no guidance; a strong one never makes a longer velocity, as plain cfg does."""
    decoder, _ = native.DecoderModel.execute(model, "normal").result
    guided = native.DecoderGuidance.execute(decoder).result[0]
    p, n = torch.randn(2, 2, 16, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    p[1] *= 3
    function = guided.model_options["sampler_cfg_function"]
    strong = function({"cond": p, "uncond": n, "cond_scale": 9.0})
    report["norms"] = [[float(a.norm()), float(b.norm())] for a, b in zip(strong, p, strict=True)]
    report["cfg 1"] = apart(function({"cond": p, "uncond": torch.zeros_like(p), "cond_scale": 1.0}), p)
    report["the model itself stays unguided"] = "sampler_cfg_function" not in decoder.model_options


def vae_and_memory(model) -> None:
    """The VAE both ways, what the host is told of memory, and that what is there is not read again."""
    decoder, vae = native.DecoderModel.execute(model, "normal").result
    library = model.components["vae"].load(torch.float32)
    pixels = torch.rand(2, 64, 96, 3, generator=torch.Generator().manual_seed(1))
    expected = library.encode(pixels.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mode()
    report["VAE Encode"] = apart(vae.encode(pixels), expected)
    report["VAE"] = [type(vae).__mro__[1].__name__, vae.latent_channels, vae.spacial_compression_encode()]
    config = library.config
    inside = decoder.model.process_latent_in(expected)
    report["latents inside"] = apart(inside, (expected - config.shift_factor) * config.scaling_factor)
    report["latents outside"] = apart(decoder.model.process_latent_out(inside), expected)
    dtype, dim = decoder.model.get_dtype(), model.components["decoder"].module.config.dim
    told = decoder.model.memory_required([2, 16, 128, 96], {"c_crossattn": [[2, 32 * 24 * 4, 48]]})
    shapes = decoder.model.extra_conds_shapes(cross_attn=torch.zeros(1, 80, 48))
    formula = management.xformers_enabled() or management.pytorch_attention_flash_attention()
    by_position = 16 * dim * dtype.itemsize if formula else 0.15 * 2**20 * decoder.model.memory_usage_factor * 4
    report["memory, of what is needed"] = told / (2 * (128 * 96 / 4 + 32 * 24 * 4) * by_position)
    report["shapes before sampling"] = {name: list(shape) for name, shape in shapes.items()}
    again = native.DecoderModel.execute(model, "normal").result
    other = native.DecoderModel.execute(model, "turbo").result
    report["shared"] = [again[0] is decoder, again[1] is vae, other[1] is vae]
    read, arguments = decoder.cached_patcher_init
    tokens = tokens_of(model, (2, 2))
    drawn = [draw(model, one, tokens, "normal") for one in (read(*arguments), decoder)]
    report["read once more by the host"] = apart(*drawn)
    alive = [weakref.ref(decoder.model), weakref.ref(vae)]
    del decoder, vae, again, other
    management.unload_all_models()
    management.current_loaded_models.clear()
    gc.collect()
    report["alive when nobody holds them"] = [ref() is not None for ref in alive]


def released_vae() -> None:
    """A VAE of the released sizes, random: the host's own model, not the library's."""
    library = importlib.import_module("diffusers").AutoencoderKL(**FLUX_VAE).eval()
    folder = Path(WORK) / "vae"
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in library.state_dict().items()}, folder / VAE_FILE)
    (folder / "config.json").write_text(json.dumps(FLUX_VAE))
    component = pack("llada_core.decoder.decode").open_vae(folder)
    vae = pack("nodes.host.zimage.vae").load_vae(front.VAEFiles(folder / VAE_FILE, FLUX_VAE, component), None)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(1, 64, 96, 3, generator=generator)
    latents = torch.randn(1, 16, 8, 12, generator=generator)
    expected = library.encode(pixels.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mode()
    picture = (library.decode(latents).sample + 1).div(2).clamp(0, 1).permute(0, 2, 3, 1)
    report["released VAE"] = [apart(vae.encode(pixels), expected), apart(vae.decode(latents), picture)]
    report["released VAE is"] = type(vae.first_stage_model).__module__.partition(".")[0]


def detection() -> None:
    """The released sizes, without weights, are those that the host's own loading finds; any other size is not."""
    config = {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "in_channels": 16}
    with torch.device("meta"):
        decoder = pack("llada_core.decoder.transformer").SemanticDecoder(**config, cap_feat_dim=4096)
    tensors = form.to_zimage_form(decoder.state_dict(), "decoder")
    found = {}
    for name, change in (("released", {}), ("theta", {"rope_theta": 10000.0}), ("layers", {"n_refiner_layers": 3})):
        found[name] = zimage._is_detected(tensors, zimage._host_config(tensors, config | change))
    report["detected"] = found


def quantized(tensors: dict[str, torch.Tensor], kind) -> dict[str, torch.Tensor]:
    """The same with every linear layer of a block stored in a format."""
    found = {}
    for key, tensor in tensors.items():
        layer, _, leaf = key.rpartition(".")
        linear = leaf == "weight" and (".attention." in key or ".feed_forward." in key) and tensor.ndim == 2
        if not linear:
            found[key] = tensor
            continue
        found |= {f"{layer}.{suffix}": stored for suffix, stored in kind.quantize(tensor).items()}
        said = kind.metadata(tuple(tensor.shape))
        if said is not None:
            found[f"{layer}.comfy_quant"] = formats.encode_metadata(said)
    return found


def dequantized(tensors: dict[str, torch.Tensor], kind) -> dict[str, torch.Tensor]:
    """What those are once they are dense again."""
    stored = {key.rpartition(".")[0]: {} for key in tensors if key.endswith("weight_scale")}
    return {
        key: kind.dequantize(
            {"weight": tensor, "weight_scale": tensors[f"{key.removesuffix('weight')}weight_scale"]},
            tensor.shape[1],
            torch.float32,
        )
        if key.rpartition(".")[0] in stored and key.endswith(".weight")
        else tensor
        for key, tensor in tensors.items()
        if not key.endswith(("comfy_quant", "weight_scale"))
    }


def forms(dense: dict[str, torch.Tensor]) -> None:
    """Decoders in other forms: the host's names, int8 of both, the header's form, blocks of FP8."""
    tokens = tokens_of(whole, (3, 2))
    expected = draw(whole, load(whole, "normal")[0], tokens, "normal")

    def drawn(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return draw(whole, load_from(whole, tensors, name), tokens, "normal")

    host_form = form.to_zimage_form(dense, "decoder")
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in host_form.items()}
    report["host's names"] = apart(drawn("names", prefixed), expected)
    int8 = quantized(dense, formats.Int8())
    rounded = drawn("rounded", dequantized(int8, formats.Int8()))
    ours = drawn("int8", int8)
    report["int8, against its dense weights"] = apart(ours, rounded)
    report["int8, against the whole"] = apart(ours, expected)
    report["int8 in the host's names"] = apart(drawn("int8-names", quantized(host_form, formats.Int8())), ours)
    quantizing = open_model(weights="8-bit")
    decoder, vae = load(quantizing, "normal")
    latents = draw(quantizing, decoder, tokens, "normal")
    report["8-bit in the loader, against int8"] = apart(latents, ours)
    decoding = options.Decoding(turbo=False, seed=SEED)
    report["8-bit, against Decode in 8-bit"] = apart(vae.decode(latents)[0], quantizing.decode(tokens, decoding)[0])
    folder = converted()
    report["converted, against int8"] = apart(draw(folder, load(folder, "normal")[0], tokens, "normal"), ours)
    blocks = quantized(dense, formats.FP8Block())
    report["blocks of FP8, against the whole"] = apart(drawn("blocks", blocks), expected)


def converted():
    """The checkpoint as this pack's own conversion writes it, decoders in int8."""
    target = f"{WORK}/converted"
    command = pack("llada_core.conversion.command")
    assert command.main([CHECKPOINT, target, "--backbone", "keep", "--decoder", "int8"]) in (0, None)
    return open_model(checkpoint=target)


def refusals(dense: dict[str, torch.Tensor]) -> None:
    """What is told where a decoder cannot be opened."""
    int8 = quantized(dense, formats.Int8())
    int8 = form.to_zimage_form(int8, "decoder")
    unknown = {k: formats.encode_metadata({"format": "int3"}) if k.endswith("quant") else t for k, t in int8.items()}
    huge = dense | {"x_pad_token": torch.full_like(dense["x_pad_token"], 1e24)}
    for name, tensors, dtype in (("int3", unknown, None), ("fp16", huge, torch.float16)):
        try:
            load_from(whole, tensors, name, dtype)
            report[f"refused, {name}"] = "nothing"
        except ValueError as error:
            report[f"refused, {name}"] = str(error)


def bfloat16() -> None:
    """Both in bfloat16: two ways of rounding, and how far bfloat16 itself is from float32."""
    exact, rough = open_model(), open_model("bf16")
    tokens = tokens_of(exact, (3, 2))
    for kind in SETTINGS:
        expected = exact.decode(tokens, options.Decoding(turbo=kind == "turbo", seed=SEED))[0]
        ours = rough.decode(tokens, options.Decoding(turbo=kind == "turbo", seed=SEED))[0]
        decoder, vae = load(rough, kind)
        found = vae.decode(draw(rough, decoder, tokens, kind))[0]
        report[f"bfloat16, {kind}"] = [str(decoder.model.get_dtype()), apart(found, ours), apart(ours, expected)]


torch.set_grad_enabled(False)
whole = open_model()
weights = load_file(Path(CHECKPOINT) / "decoder" / FILE)
evaluations(whole)
pictures(whole)
batches(whole)
guidance(whole)
vae_and_memory(whole)
released_vae()
detection()
forms(weights)
refusals(weights)
bfloat16()
print(json.dumps(report))
