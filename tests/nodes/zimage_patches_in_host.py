"""Run by test_zimage.py inside a real ComfyUI's own modules: LoRA and ControlNet on the decoder as the host's Z-Image.

Usage: python zimage_patches_in_host.py <ComfyUI folder> <checkpoint> <work folder> --cpu. Prints a JSON object. A LoRA
is right where the latents are those of a decoder whose file holds the dense sum of weights and update.
"""

import importlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from zimage_tools import CHECKPOINT, FILE, WORK, apart, core, draw, load, load_from, open_model, tokens_of

folder_paths = importlib.import_module("folder_paths")
management = importlib.import_module("comfy.model_management")
patcher = importlib.import_module("comfy.model_patcher")
operations = importlib.import_module("comfy.ops").manual_cast
controlnet = importlib.import_module("comfy.ldm.lumina.controlnet")
model_patch = importlib.import_module("comfy_extras.nodes_model_patch")

RANK, ALPHA, STRENGTH = 2, 4.0, 0.8
LAYERS = [
    *(f"layers.1.attention.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")),
    "layers.0.feed_forward.w2",
    "noise_refiner.0.attention.to_v",
    "context_refiner.0.feed_forward.w1",
]
report: dict = {}


def updates(dense: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> down [rank, in] and up [out, rank], so that ALPHA / RANK times up @ down is the update."""
    generator = torch.Generator().manual_seed(5)

    def random(*size: int) -> torch.Tensor:
        return 0.2 * torch.randn(*size, generator=generator)

    shapes = {layer: dense[f"{layer}.weight"].shape for layer in LAYERS}
    return {layer: (random(RANK, width), random(out, RANK)) for layer, (out, width) in shapes.items()}


def fused(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The same under Z-Image's own names: queries, keys and values are one layer of three times the rank."""
    found = {}
    for layer, (down, up) in pairs.items():
        block, _, part = layer.rpartition(".attention.")
        if part not in ("to_q", "to_k", "to_v"):
            found[layer.replace("to_out.0", "out")] = down, up
            continue
        whole = f"{block}.attention.qkv"
        place = ("to_q", "to_k", "to_v").index(part)
        rows = torch.zeros(3 * len(up), RANK)
        rows[place * len(up) : (place + 1) * len(up)] = up
        before = found.get(whole)
        found[whole] = (torch.cat([before[0], down]), torch.cat([before[1], rows], 1)) if before else (down, rows)
    return found


def file(pairs: dict, prefix: str, ends: tuple[str, str], underscores: bool) -> dict[str, torch.Tensor]:
    """A LoRA file's tensors; without an alpha of its own its scale is in the up matrix."""
    found = {}
    for layer, (down, up) in pairs.items():
        name = prefix + (layer.replace(".", "_") if underscores else layer)
        found[f"{name}.{ends[0]}.weight"] = down
        if underscores:
            found[f"{name}.{ends[1]}.weight"], found[f"{name}.alpha"] = up, torch.tensor(ALPHA / RANK * len(down))
        else:
            found[f"{name}.{ends[1]}.weight"] = up * (ALPHA / RANK)
    return found


def loras(model, dense: dict[str, torch.Tensor]) -> None:
    """Every form of names that LoRAs of Z-Image come in, through the host's own node."""
    pairs = updates(dense)
    peft, kohya = ("lora_A", "lora_B"), ("lora_down", "lora_up")
    forms = {
        "transformer., diffusers' names": file(pairs, "transformer.", peft, False),
        "diffusion_model., diffusers' names": file(pairs, "diffusion_model.", kohya, False),
        "diffusion_model., Z-Image's names": file(fused(pairs), "diffusion_model.", peft, False),
        "no prefix, diffusers' names": file(pairs, "", peft, False),
        "lora_unet_, Z-Image's names": file(fused(pairs), "lora_unet_", kohya, True),
        "lycoris_, diffusers' names": file(pairs, "lycoris_", kohya, True),
    }
    tokens = tokens_of(model, (3, 2))
    decoder, _ = load(model, "normal")
    plain = draw(model, decoder, tokens, "normal")
    scale = STRENGTH * ALPHA / RANK
    sums = {f"{layer}.weight": dense[f"{layer}.weight"] + scale * up @ down for layer, (down, up) in pairs.items()}
    expected = draw(model, load_from(model, dense | sums, "sum"), tokens, "normal")
    report["what the update changes"] = apart(expected, plain)
    folder = Path(WORK) / "loras"
    folder.mkdir()
    folder_paths.add_model_folder_path("loras", str(folder))
    for index, (name, tensors) in enumerate(forms.items()):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{index}.safetensors")
        (patched,) = core.LoraLoaderModelOnly().load_lora_model_only(decoder, f"{index}.safetensors", STRENGTH)
        report[f"LoRA, {name}"] = apart(draw(model, patched, tokens, "normal"), expected)
    report["afterwards, without"] = apart(draw(model, decoder, tokens, "normal"), plain)


def control(model) -> None:
    """The host's ControlNet for Z-Image, of this decoder's sizes and with random weights."""
    config = model.components["decoder"].module.config
    module = controlnet.ZImage_Control(
        dim=config.dim, n_heads=config.n_heads, n_kv_heads=config.n_heads, operations=operations, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(9)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    patch = patcher.ModelPatcher(module, load_device=management.get_torch_device(), offload_device=torch.device("cpu"))
    decoder, vae = load(model, "normal")
    tokens = tokens_of(model, (3, 2))
    picture = torch.rand(1, 96, 64, 3, generator=generator)
    plain = draw(model, decoder, tokens, "normal")

    def controlled(strength: float, image: torch.Tensor) -> torch.Tensor:
        (patched,) = model_patch.ZImageFunControlnet().diffsynth_controlnet(decoder, patch, vae, image, strength)
        return draw(model, patched, tokens, "normal")

    strong = controlled(1.0, picture)
    report["ControlNet, strength 0"] = apart(controlled(0.0, picture), plain)
    report["ControlNet, strength 1"] = apart(strong, plain)
    report["ControlNet, another picture"] = apart(controlled(1.0, 1 - picture), strong)
    for block in module.control_layers:
        block.after_proj.weight.data.zero_()
        block.after_proj.bias.data.zero_()
    report["ControlNet, that adds nothing"] = apart(controlled(1.0, picture), plain)


torch.set_grad_enabled(False)
whole = open_model()
loras(whole, load_file(Path(CHECKPOINT) / "decoder" / FILE))
control(whole)
print(json.dumps(report))
