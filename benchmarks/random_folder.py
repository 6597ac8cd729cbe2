"""A checkpoint folder in the released layout with random weights, at released sizes or tiny ones.

Random weights of one spread send all mask tokens to nearly the same experts. Here queries and keys are long and
embeddings short, so that tokens take after what they attend to, which differs from place to place: about four fifths of
all experts are hit by the 64 tokens of a round, as a trained router does it.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from llada_core.backbone.config import BackboneConfig

from .fullsize import Sizes
from .support import ROOT

GOLDEN = ROOT / "tests" / "goldens" / "alpha" / "checkpoint"
LONG, SHORT = 6.0, 0.02  # weights of the query and key norms; spread of embeddings
THREADS = 8
_BYTES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Vision:
    """Sizes of SigLIP-VQ."""

    depth: int = 40
    hidden_size: int = 1536
    num_heads: int = 16
    intermediate_size: int = 6144
    image_size: int = 1024
    embed_dim: int = 2048


@dataclass(frozen=True)
class Tensor:
    """What goes into a file: a shape, and numbers of a mean and a spread (0 where all are the mean)."""

    shape: tuple[int, ...]
    mean: float
    spread: float


def write_folder(target: Path, sizes: Sizes, vision: Vision, device: torch.device) -> None:
    """Write a whole checkpoint, but for the normal decoder, in sizes.dtype. `device` makes the numbers."""
    for name in ("image_tokenizer", "decoder-turbo", "vae"):
        (target / name).mkdir(parents=True)
    shutil.copy(GOLDEN / "tokenizer.json", target)
    codes = sizes.backbone.vocab_size - sizes.backbone.image_token_offset
    write_json(target / "config.json", asdict(sizes.backbone))
    files = dict(backbone_files(sizes.backbone))
    index = {name: file for file, tensors in files.items() for name in tensors}
    write_json(target / "model.safetensors.index.json", {"weight_map": index})
    files |= pixel_files(target, sizes, vision, codes)
    with ThreadPoolExecutor(THREADS) as threads:
        list(
            threads.map(
                lambda item: write_tensors(target / item[1][0], item[1][1], sizes.dtype, device, seed=item[0]),
                enumerate(files.items()),
            )
        )
    width = sizes.features
    embedder = {
        "prior_token_embedding.weight": (codes, width),
        "prior_projector.net.0.proj.weight": (width, width),
        "prior_projector.net.0.proj.bias": (width,),
        "prior_projector.net.2.weight": (width, width),
        "prior_projector.net.2.bias": (width,),
    }
    tensors = {name: torch.randn(shape, dtype=sizes.dtype) * width**-0.5 for name, shape in embedder.items()}
    torch.save(tensors, target / "image_tokenizer" / "sigvq_embedding.pt")


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON."""
    path.write_text(json.dumps(value))


def backbone_files(config: BackboneConfig) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """A file a layer, under the names of the release: its experts one by one."""
    c = config
    ends = {
        "model.word_embeddings.weight": Tensor((c.vocab_size, c.hidden_size), 0, SHORT),
        "model.norm.weight": Tensor((c.hidden_size,), 1, 0),
        "lm_head.weight": matrix(c.vocab_size, c.hidden_size),
    }
    for name, tensor in ends.items():
        yield f"model-{name.split('.')[-2]}.safetensors", {name: tensor}
    for n in range(c.num_hidden_layers):
        yield f"model-layer{n:02}.safetensors", layer_tensors(c, n)


def layer_tensors(c: BackboneConfig, n: int) -> dict[str, Tensor]:
    """Everything of layer n."""
    stem, attention = f"model.layers.{n}", f"model.layers.{n}.attention"
    heads = c.num_attention_heads + 2 * c.num_key_value_heads
    tensors = {f"{stem}.{name}.weight": Tensor((c.hidden_size,), 1, 0) for name in LAYER_NORMS}
    tensors |= {f"{attention}.{name}.weight": Tensor((c.head_dim,), LONG, 0) for name in HEAD_NORMS}
    tensors[f"{attention}.query_key_value.weight"] = matrix(heads * c.head_dim, c.hidden_size)
    tensors[f"{attention}.dense.weight"] = matrix(c.hidden_size, c.num_attention_heads * c.head_dim)
    if n < c.first_k_dense_replace:
        return tensors | mlp(f"{stem}.mlp", c.hidden_size, c.intermediate_size)
    tensors[f"{stem}.mlp.gate.weight"] = matrix(c.num_experts, c.hidden_size)
    tensors[f"{stem}.mlp.gate.expert_bias"] = Tensor((c.num_experts,), 0, 0)
    shared = c.moe_intermediate_size * c.num_shared_experts
    tensors |= mlp(f"{stem}.mlp.shared_experts", c.hidden_size, shared)
    for expert in range(c.num_experts):
        tensors |= mlp(f"{stem}.mlp.experts.{expert}", c.hidden_size, c.moe_intermediate_size)
    return tensors


LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("query_layernorm", "key_layernorm")


def matrix(rows: int, columns: int) -> Tensor:
    """A matrix that keeps the length of what it multiplies."""
    return Tensor((rows, columns), 0, columns**-0.5)


def mlp(stem: str, hidden: int, inner: int) -> dict[str, Tensor]:
    """A gated MLP."""
    return {
        f"{stem}.gate_proj.weight": matrix(inner, hidden),
        f"{stem}.up_proj.weight": matrix(inner, hidden),
        f"{stem}.down_proj.weight": matrix(hidden, inner),
    }


def pixel_files(target: Path, sizes: Sizes, vision: Vision, codes: int) -> Mapping[str, dict[str, Tensor]]:
    """Vision, decoder and VAE: their configurations are written, their tensors listed."""
    from diffusers import AutoencoderKL
    from transformers.models.glm_image.configuration_glm_image import GlmImageVisionConfig, GlmImageVQVAEConfig
    from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel, GlmImageVQVAE

    from llada_core.decoder.transformer import SemanticDecoder

    def read(name: str) -> dict:
        return json.loads((GOLDEN / name / "config.json").read_text())

    shutil.copy(GOLDEN / "image_tokenizer" / "preprocessor_config.json", target / "image_tokenizer")
    seen = read("image_tokenizer")
    fields = asdict(vision)
    embed_dim = fields.pop("embed_dim")
    seen["vision_config"] |= fields
    seen["vq_config"] |= {"num_embeddings": codes, "embed_dim": embed_dim, "latent_channels": vision.hidden_size}
    decoder = read("decoder-turbo") | {"axes_dims": [32, 48, 48]} | sizes.decoder | {"cap_feat_dim": sizes.features}
    vae = read("vae") | {name: list(v) if isinstance(v, tuple) else v for name, v in sizes.vae.items()}
    for name, config in (("image_tokenizer", seen), ("decoder-turbo", decoder), ("vae", vae)):
        write_json(target / name / "config.json", config)
    kept = {name: value for name, value in decoder.items() if not name.startswith("_")}
    with torch.device("meta"):
        visual = GlmImageVisionModel(GlmImageVisionConfig(**seen["vision_config"]))
        quantizer = GlmImageVQVAE(GlmImageVQVAEConfig(**seen["vq_config"]))
        transformer = SemanticDecoder(**kept)
        pixels = AutoencoderKL(**{name: value for name, value in vae.items() if not name.startswith("_")})
    tokenizer = tensors_of(visual, "model.visual.") | tensors_of(quantizer, "model.vqmodel.")
    names = {name.replace("cap_embedder.", "semantic_embedder."): t for name, t in tensors_of(transformer).items()}
    return {
        "image_tokenizer/image_tokenizer.safetensors": tokenizer,
        "decoder-turbo/decoder_model.safetensors": names,
        "vae/diffusion_pytorch_model.safetensors": tensors_of(pixels),
    }


def tensors_of(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a module: matrices that keep lengths, norms of ones, other vectors of zeros."""

    def numbers(name: str, tensor: torch.Tensor) -> Tensor:
        shape = tuple(tensor.shape)
        if tensor.ndim > 1:
            return Tensor(shape, 0, torch.Size(shape[1:]).numel() ** -0.5)
        return Tensor(shape, float("norm" in name and not name.endswith("bias")), 0)

    return {prefix + name: numbers(name, tensor) for name, tensor in module.state_dict().items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, device, seed: int) -> None:
    """Write a safetensors file, a tensor at a time."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + torch.Size(tensor.shape).numel() * dtype.itemsize
        header[name] = {"dtype": _BYTES[dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator(device).manual_seed(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            numbers = torch.empty(tensor.shape, dtype=dtype, device=device).fill_(tensor.mean)
            if tensor.spread:
                numbers.normal_(tensor.mean, tensor.spread, generator=generator)
            file.write(memoryview(numbers.cpu().reshape(-1).view(torch.uint8).numpy()))
