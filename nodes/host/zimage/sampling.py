"""Sampling of the decoder as the host's own model: noise, guidance and noise levels as Decode has them."""

from collections.abc import Callable
from typing import Any

import comfy.k_diffusion.sampling as k_diffusion
import torch
from comfy.model_patcher import ModelPatcher

from ....llada_core.zimage import guide, noise_stream


def draw_noise_as_decode(executor, guider, sigmas, extra_args, callback, noise, *others):
    """Run the host's sampler; where it is `lcm`, with the fresh noise of each round that Decode draws.

    The host takes another generator for that than for the initial noise, on whatever device it samples. Decode goes on
    with the generator of the initial noise, on the CPU, so that a seed means the same picture everywhere. Image i of a
    batch goes on with that of seed + i. Arguments: the host's, as its wrappers of samplers are given them.
    """
    sampler, seed = executor.class_obj, extra_args.get("seed")
    lcm = getattr(sampler, "sampler_function", None) is k_diffusion.sample_lcm
    if not lcm or seed is None or "noise_sampler" in sampler.extra_options:
        return executor(guider, sigmas, extra_args, callback, noise, *others)
    streams = [noise_stream(seed + index, noise.shape[1:]) for index in range(len(noise))]
    for stream in streams:
        next(stream)  # the initial noise

    def fresh(sigma, sigma_next) -> torch.Tensor:
        return torch.stack([next(stream) for stream in streams]).to(noise)

    # The host may keep the sampler for other prompts, so it is handed back as it was.
    kept = sampler.extra_options
    sampler.extra_options = kept | {"noise_sampler": fresh}
    try:
        return executor(guider, sigmas, extra_args, callback, noise, *others)
    finally:
        sampler.extra_options = kept


def with_decoder_guidance(model: ModelPatcher) -> ModelPatcher:
    """The same model, guided as the decoders were made to be: never longer than the conditional velocity."""
    guided = model.clone()
    guided.set_model_sampler_cfg_function(_guided)
    return guided


def _guided(args: dict[str, Any]) -> torch.Tensor:
    """The host's cfg function: from what each side takes away from the latents, which is the velocity times sigma.

    The host's scale is one more than the engine's: n + cfg·(p - n) = p + (cfg - 1)·(p - n). Norms are a picture's own,
    also in a batch.
    """
    sides = zip(args["cond"], args["uncond"], strict=True)
    return torch.stack([guide(p, n, args["cond_scale"] - 1) for p, n in sides])


def even_sigmas(model: ModelPatcher, steps: int, denoise: float) -> torch.Tensor:
    """Noise levels whose times are even before the model's shift, without the host's rounding to a table.

    Args:
        model: any flow model of the host.
        steps: evaluations, at least 1.
        denoise: 0...1, the share of the way from noise to image that is gone; 0 gives no levels at all.

    Returns:
        float32 [steps + 1], falling to 0.
    """
    if denoise <= 0:
        return torch.FloatTensor([])
    sampling = model.get_model_object("model_sampling")
    even = torch.arange(steps, -1, -1, dtype=torch.float64) / steps * denoise
    to_sigma: Callable[[torch.Tensor], torch.Tensor] = sampling.sigma
    return to_sigma(even * getattr(sampling, "multiplier", 1.0)).float()
