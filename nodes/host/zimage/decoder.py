"""The decoder as one of the host's own models: Z-Image, with the host's classes, loading and samplers.

Importing this file needs a host that has Z-Image; `zimage_missing` says whether it has.
"""

import json
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import comfy.latent_formats
import comfy.ldm.lumina.model as lumina
import comfy.model_base
import comfy.model_detection
import comfy.model_management as management
import comfy.model_patcher
import comfy.quant_ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import TimestepEmbedder
from comfy.patcher_extension import WrappersMP

from ....llada_core.errors import CheckpointError, InputError
from ....llada_core.zimage import DecoderFiles, VAEFiles, asked_form, quantize_layers, to_zimage_form
from ..component_manager import HostComponentManager
from .sampling import draw_noise_as_decode
from .vae import load_vae

QK_EPS = 1e-5  # of the norms of queries and keys as the decoders were trained; the host leaves float32's epsilon
# Entries of the table that the host's schedulers choose noise levels from. It has 1,000, which 49 even steps do not
# divide; 8 and 49 divide this one, so that its scheduler `simple` gives the steps of both decoders exactly.
SIGMAS = 1176
POSITION = 4  # latents of a position of the transformer
PEAK = 16  # numbers for each position and each of its channels, where the transformer needs most memory


class Decoder(comfy.model_base.Lumina2):
    """The host's Z-Image, which counts its conditioning when it is asked how much memory it needs.

    Attributes:
        evaluations: how many this decoder takes by default.
    """

    evaluations: int

    def extra_conds_shapes(self, cross_attn=None, **others):
        """Shapes that the host reckons with before it samples; the conditioning is as long as the picture."""
        shapes = super().extra_conds_shapes(**others)
        return shapes if cross_attn is None else shapes | {"c_crossattn": list(cross_attn.shape)}


def decoder_and_vae(
    manager: HostComponentManager, decoder: DecoderFiles, vae: VAEFiles
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.VAE]:
    """A decoder and the VAE as the host's; what another node of the same checkpoint still holds is not read again."""
    loaded_vae = manager.shared.get("vae") or load_vae(vae, manager.precision)
    found = manager.shared.get(decoder.label)
    loaded = found or load_decoder(decoder, vae.config, manager.precision, manager.weights)
    manager.shared.update({"vae": loaded_vae, decoder.label: loaded})
    return loaded, loaded_vae


def empty_latent(shape: Sequence[int]) -> dict[str, Any]:
    """Zeros, as the host's own nodes give them."""
    return {"samples": torch.zeros(*shape, device=management.intermediate_device())}


def own_steps(model: comfy.model_patcher.ModelPatcher) -> int:
    """How many evaluations a decoder takes by default. Raises InputError for a model that is none."""
    if not isinstance(model.model, Decoder):
        found, expected = f"a model of another kind ({type(model.model).__name__})", "one from Load Decoder"
        raise InputError("model", found, expected, "Connect Load Decoder, or choose steps above 0.")
    return model.model.evaluations


def load_decoder(
    files: DecoderFiles,
    vae_config: Mapping[str, Any],
    dtype: torch.dtype | None,
    weights: str = "as stored",
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """Read a decoder into the host's Z-Image.

    Args:
        files: the decoder's.
        vae_config: of the checkpoint's VAE, for the factors of its latents.
        dtype: of the weights; None lets the host choose, as it does for its other models.
        weights: "as stored", or "8-bit" or "4-bit", which quantize dense layers to int8, in the host's own form.
        disable_dynamic: without DynamicVRAM; the host asks for it where a patch cannot work with it.

    Raises:
        CheckpointError: a file that is damaged or quantized so that the host cannot hold it.
        InputError: float16 for weights that it cannot hold.
    """
    tensors, metadata = comfy.utils.load_torch_file(str(files.weights), return_metadata=True)
    if hasattr(comfy.utils, "convert_old_quants"):
        tensors, _ = comfy.utils.convert_old_quants(tensors, "", metadata=metadata)
    tensors = to_zimage_form(tensors, files.label)
    form = asked_form(weights, files.label)
    if form is not None:
        tensors = quantize_layers(tensors, form, management.get_torch_device())
    _check_quantization(tensors, files.label)
    if dtype == torch.float16:
        _check_float16(tensors, files.label)
    config = _host_config(tensors, files.config)
    if _is_detected(tensors, config):
        options = {} if dtype is None else {"dtype": dtype}
        # Hosts without DynamicVRAM never ask for a model without it, and do not know the argument.
        more = {"disable_dynamic": True} if disable_dynamic else {}
        patcher = comfy.sd.load_diffusion_model_state_dict(tensors, options, **more)
    else:
        patcher = _load_sized(tensors, config, dtype, disable_dynamic)
    _finish(patcher, files, vae_config)
    patcher.cached_patcher_init = (load_decoder, (files, vae_config, dtype, weights))  # how the host reads it once more
    return patcher


def _check_quantization(tensors: Mapping[str, torch.Tensor], label: str) -> None:
    """Raise CheckpointError where layers are in a form that this host does not read."""
    said = [json.loads(bytes(tensor.tolist())) for key, tensor in tensors.items() if key.endswith(".comfy_quant")]
    used = {str(one.get("format")) for one in said}
    known = set(comfy.quant_ops.QUANT_ALGOS) if used and hasattr(comfy.utils, "detect_layer_quantization") else set()
    if used - known:
        found, expected = (
            ", ".join(sorted(used - known)),
            f"layers quantized as {', '.join(sorted(known)) or 'nothing'}",
        )
        remedy = "Update ComfyUI, or use dense weights: as stored in Load LLaDA-Uni, and files that are not quantized."
        raise CheckpointError(label, f"layers quantized as {found}", f"{expected}, which this ComfyUI reads", remedy)


def _check_float16(tensors: Mapping[str, torch.Tensor], label: str) -> None:
    """Raise InputError where float16 cannot hold the pad tokens; of Z-Image's kin they are known to reach 1e24."""
    largest = max(float(tensor.abs().max()) for key, tensor in tensors.items() if key.endswith("pad_token"))
    if largest > torch.finfo(torch.float16).max:
        found = f"fp16 for {label}, whose pad tokens reach {largest:.3g}"
        raise InputError("precision", found, "a type that holds them", "Choose bf16 or fp32.")


def _host_config(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """The host's configuration of Z-Image, from a decoder's config.json and its tensors in Z-Image's form."""
    feed_forward = len(tensors["layers.0.feed_forward.w1.weight"])
    return {
        "image_model": "lumina2",
        "patch_size": 2,
        "in_channels": config["in_channels"],
        "dim": config["dim"],
        "cap_feat_dim": len(tensors["cap_embedder.0.weight"]),
        "n_layers": config["n_layers"],
        "n_refiner_layers": config["n_refiner_layers"],
        "n_heads": config["n_heads"],
        "n_kv_heads": config["n_heads"],
        "qk_norm": config.get("qk_norm", True),
        "norm_eps": config.get("norm_eps", 1e-5),
        "axes_dims": list(config.get("axes_dims", (32, 48, 48))),
        "rope_theta": float(config.get("rope_theta", 256.0)),
        "multiple_of": 1,
        # Half a channel more, because the host multiplies in floating point and cuts off what is behind the point.
        "ffn_dim_multiplier": (feed_forward + 0.5) / config["dim"],
        "z_image_modulation": True,
        "time_scale": float(config.get("t_scale", 1000.0)),
        "pad_tokens_multiple": 32,
    }


def _time_widths(tensors: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Inner and outer width of the time embedder."""
    return len(tensors["t_embedder.mlp.0.bias"]), len(tensors["t_embedder.mlp.2.bias"])


def _is_detected(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> bool:
    """Whether the host's detection finds this very configuration, so that its own loading is enough."""
    detected = comfy.model_detection.detect_unet_config(tensors, "") or {}
    defaults = {"n_refiner_layers": 2, "norm_eps": 1e-5, "multiple_of": 1}  # of the host's class
    feed_forward = int(config["ffn_dim_multiplier"] * config["dim"])
    found = defaults | detected | {"ffn_dim_multiplier": config["ffn_dim_multiplier"]}
    same = all(found.get(name) == value for name, value in config.items())
    released = (-(-int(detected.get("ffn_dim_multiplier", 0) * config["dim"]) // 256) * 256, (1024, 256))
    return same and (feed_forward, _time_widths(tensors)) == released


def _load_sized(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], dtype: torch.dtype | None, disable_dynamic: bool
) -> comfy.model_patcher.ModelPatcher:
    """What the host's own loading does, for sizes that its detection does not know."""
    made = comfy.supported_models.ZImage(config)
    quantized = any(key.endswith(".comfy_quant") for key in tensors)
    if quantized:
        made.quant_config = comfy.utils.detect_layer_quantization(tensors, "")
    device, offload = management.get_torch_device(), management.unet_offload_device()
    if dtype is None:
        stored = None if quantized else comfy.utils.weight_dtype(tensors)
        count, types = comfy.utils.calculate_parameters(tensors), list(made.supported_inference_dtypes)
        dtype = management.unet_dtype(model_params=count, supported_dtypes=types, weight_dtype=stored)
    cast = management.unet_manual_cast(None if quantized else dtype, device, made.supported_inference_dtypes)
    made.set_inference_dtype(dtype, cast)
    model = made.get_model(tensors, "")
    # The host takes its width from the transformer's, which is right for the released sizes alone.
    inner, outer = _time_widths(tensors)
    operations = SimpleNamespace(Linear=type(model.diffusion_model.x_embedder))
    model.diffusion_model.t_embedder = TimestepEmbedder(inner, output_size=outer, dtype=dtype, operations=operations)
    # Looked up here: the host puts another class there where it runs with DynamicVRAM.
    core = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else core
    patcher = kind(model, load_device=device, offload_device=offload)
    if not management.is_device_cpu(offload):
        model.to(offload)
    if kind is core and hasattr(patcher, "is_dynamic") and patcher.is_dynamic():
        model.load_model_weights(tensors, "", assign=True)
    else:
        model.load_model_weights(tensors, "")
    return patcher


def _finish(patcher: comfy.model_patcher.ModelPatcher, files: DecoderFiles, vae_config: Mapping[str, Any]) -> None:
    """Make the host's Z-Image this decoder: norms, latents, noise levels, memory, noise."""
    model = patcher.model
    model.__class__ = Decoder
    model.evaluations = files.evaluations
    for module in model.diffusion_model.modules():
        if isinstance(module, lumina.JointAttention) and hasattr(module.q_norm, "eps"):
            module.q_norm.eps = module.k_norm.eps = QK_EPS
    model.latent_format = model.model_config.latent_format = DecoderLatents(files.config, vae_config)
    model.model_config.sampling_settings["shift"] = files.shift
    model.model_sampling.set_parameters(shift=files.shift, timesteps=SIGMAS, multiplier=1.0)
    # The host reckons with factor x 0.01 MiB for each latent and byte of a number.
    model.memory_usage_factor = PEAK * files.config["dim"] / POSITION / (0.01 * 2**20)
    model.memory_usage_factor_conds = (*model.memory_usage_factor_conds, "c_crossattn")
    model.memory_usage_shape_process = model.memory_usage_shape_process | {"c_crossattn": _as_latents}
    patcher.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "llada_uni", draw_noise_as_decode)


def _as_latents(shape: Sequence[int]) -> list[int]:
    """The shape of latents of as many positions as a conditioning [batch, tokens, width] has."""
    return [shape[0], 1, shape[1] * POSITION]


class DecoderLatents(comfy.latent_formats.Flux):
    """Flux's latents, which the released VAE has, with the factors of the checkpoint's VAE."""

    def __init__(self, decoder_config: Mapping[str, Any], vae_config: Mapping[str, Any]):
        super().__init__()
        self.latent_channels = decoder_config["in_channels"]
        self.scale_factor = vae_config["scaling_factor"]
        self.shift_factor = vae_config.get("shift_factor") or 0.0
