"""A checkpoint folder in the released layout with random weights, at released sizes or tiny ones.

Random weights of one spread send all mask tokens to nearly the same experts. Here queries and keys are long and
embeddings short, so that tokens take after what they attend to, which differs from place to place: about four fifths of
all experts are hit by the 64 tokens of a round, as a trained router does it.

In 8 or 4 bits the folder is what a conversion makes, without one: codes are drawn evenly, and scales are such that the
weights have the same spread.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from llada_core.backbone.cache import PrefixCache
from llada_core.backbone.config import BackboneConfig
from llada_core.backbone.experts import Router
from llada_core.backbone.keys import converted_key, released_keys
from llada_core.backbone.model import Backbone
from llada_core.checkpoint.layout import QUANTIZATION, QUANTIZATION_VERSION
from llada_core.checkpoint.weights import FILE_DTYPES, companions
from llada_core.decoder.decode import released_key
from llada_core.quantization.choices import asked_form, quantizable
from llada_core.quantization.formats import METADATA_SUFFIX, Dense, Format, Int4, Int8, describe, encode_metadata

from .fullsize import Sizes
from .support import ROOT

GOLDEN = ROOT / "tests" / "goldens" / "alpha" / "checkpoint"
LONG, SHORT = 6.0, 0.02  # weights of the query and key norms; spread of embeddings
THREADS = 8
PAGE = 4096  # bytes, on which large tensors begin, as the conversion has them
# Spread and mean of codes that are drawn evenly.
_EVEN = {Int4: (4.61, -0.5), Int8: (73.9, -0.5)}
_NAMES = {dtype: name for name, dtype in FILE_DTYPES.items()}


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
    """What goes into a file: a shape, and numbers of a mean and a spread (0 where all are the mean).

    Attributes:
        form: how the weight is stored, Int4 or Int8; None in the files' type.
    """

    shape: tuple[int, ...]
    mean: float
    spread: float
    form: Format | None = None

    def stored(self, name: str, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Key -> shape and type of each stored tensor of a weight of that name; what `comfy_quant` says is left out."""
        form = self.form or Dense(dtype)
        keys = companions(name, form, self.shape)
        return {keys[suffix]: stored for suffix, stored in form.tensors(self.shape).items()}


def write_folder(target: Path, sizes: Sizes, vision: Vision, device: torch.device, weights: str = "as stored") -> None:
    """Write a whole checkpoint, but for the normal decoder, in sizes.dtype. `device` makes the numbers.

    Args:
        weights: one of `options.WEIGHTS`: in how many bits backbone and decoder are stored.
    """
    for name in ("image_tokenizer", "decoder-turbo", "vae"):
        (target / name).mkdir(parents=True)
    shutil.copy(GOLDEN / "tokenizer.json", target)
    codes = sizes.backbone.vocab_size - sizes.backbone.image_token_offset
    forms = {part: form for part in ("backbone", "decoder-turbo") if (form := asked_form(weights, part)) is not None}
    said = {QUANTIZATION: {"version": QUANTIZATION_VERSION, "parts": {p: describe(f) for p, f in forms.items()}}}
    write_json(target / "config.json", asdict(sizes.backbone) | (said if forms else {}))
    files = dict(backbone_files(sizes.backbone, forms.get("backbone")))
    index = {
        key: file
        for file, tensors in files.items()
        for name, t in tensors.items()
        for key in t.stored(name, sizes.dtype)
    }
    write_json(target / "model.safetensors.index.json", {"weight_map": index})
    files |= pixel_files(target, sizes, vision, codes, forms.get("decoder-turbo"))
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


def backbone_files(config: BackboneConfig, form: Format | None = None) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """A file a layer, under the names of the release, its experts one by one; with a form as a conversion has it."""
    with torch.device("meta"):
        module = Backbone(config)
    layers = quantizable("backbone", module) if form is not None else {}
    files: dict[str, dict[str, Tensor]] = {}
    for name, whole in module.state_dict().items():
        parts = dict(released_keys(name, config))
        tensor = numbers(name, whole[next(iter(parts.values()))])  # an expert's matrix, where it is a bank
        if form is None:
            tensors = {key: replace(tensor, shape=tuple(whole[part].shape)) for key, part in parts.items()}
        else:
            given = form if name in layers else None
            tensors = {converted_key(name): replace(tensor, shape=tuple(whole.shape), form=given)}
        stem = name.split(".")
        file = f"layer{int(stem[1]):02}" if stem[0] == "layers" else stem[0]
        files.setdefault(f"model-{file}.safetensors", {}).update(tensors)
    yield from files.items()


def read(name: str) -> dict:
    """The configuration of a part of the golden checkpoint."""
    return json.loads((GOLDEN / name / "config.json").read_text())


def tokenizer_config(vision: Vision, codes: int) -> dict:
    """The configuration of SigLIP-VQ in these sizes."""
    seen, fields = read("image_tokenizer"), asdict(vision)
    embed_dim = fields.pop("embed_dim")
    seen["vision_config"] |= fields
    seen["vq_config"] |= {"num_embeddings": codes, "embed_dim": embed_dim, "latent_channels": vision.hidden_size}
    return seen


def pixel_files(
    target: Path, sizes: Sizes, vision: Vision, codes: int, form: Format | None
) -> Mapping[str, dict[str, Tensor]]:
    """Vision, decoder (its layers in a form) and VAE: their configurations are written, their tensors listed."""
    from diffusers import AutoencoderKL
    from transformers.models.glm_image.configuration_glm_image import GlmImageVisionConfig, GlmImageVQVAEConfig
    from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel, GlmImageVQVAE

    from llada_core.decoder.transformer import SemanticDecoder

    shutil.copy(GOLDEN / "image_tokenizer" / "preprocessor_config.json", target / "image_tokenizer")
    seen = tokenizer_config(vision, codes)
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
    layers = quantizable("decoder", transformer) if form is not None else {}
    names = {
        released_key(name): replace(tensor, form=form) if name in layers else tensor
        for name, tensor in tensors_of(transformer).items()
    }
    return {
        "image_tokenizer/image_tokenizer.safetensors": tokenizer,
        "decoder-turbo/decoder_model.safetensors": names,
        "vae/diffusion_pytorch_model.safetensors": tensors_of(pixels),
    }


def tensors_of(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a module."""
    return {prefix + name: numbers(name, tensor) for name, tensor in module.state_dict().items()}


def numbers(name: str, tensor: torch.Tensor) -> Tensor:
    """Matrices that keep lengths, norms of ones, other vectors of zeros; and what spreads the tokens over experts."""
    shape = tuple(tensor.shape)
    if name == "word_embeddings.weight":
        return Tensor(shape, 0, SHORT)
    if name.endswith(("query_layernorm.weight", "key_layernorm.weight")):
        return Tensor(shape, LONG, 0)
    if tensor.ndim > 1:
        return Tensor(shape, 0, torch.Size(shape[1:]).numel() ** -0.5)
    return Tensor(shape, float("norm" in name and not name.endswith("bias")), 0)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, device, seed: int) -> None:
    """Write a safetensors file, a tensor at a time."""
    generator = torch.Generator(device).manual_seed(seed)
    entries: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    notes: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        entries |= tensor.stored(name, dtype)
        said = None if tensor.form is None else tensor.form.metadata(tensor.shape)
        if said is not None:
            key = companions(name, tensor.form, tensor.shape)[METADATA_SUFFIX]
            notes[key] = encode_metadata(said)
            entries[key] = (tuple(notes[key].shape), torch.uint8)
    sizes = {key: torch.Size(shape).numel() * kind.itemsize for key, (shape, kind) in entries.items()}
    header, places, end = {}, {}, 0
    for key in sorted(entries, key=lambda key: (sizes[key] % PAGE != 0, -sizes[key])):
        places[key], end = end, end + sizes[key]
        shape, kind = entries[key]
        header[key] = {"dtype": _NAMES[kind], "shape": list(shape), "data_offsets": [places[key], end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % PAGE)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)

        def put(key: str, numbers: torch.Tensor) -> None:
            file.seek(8 + len(text) + places[key])
            view = memoryview(numbers.cpu().reshape(-1).view(torch.uint8).numpy())
            while view:
                view = view[file.write(view) :]

        for key, note in notes.items():
            put(key, note)
        for name, tensor in tensors.items():
            for key, (shape, kind) in tensor.stored(name, dtype).items():
                put(key, contents(tensor, key, shape, kind, device, generator))


def contents(
    tensor: Tensor, key: str, shape: tuple[int, ...], dtype: torch.dtype, device, generator: torch.Generator
) -> torch.Tensor:
    """What a stored tensor holds: the weight itself, evenly drawn codes, or the scale or zero of them."""
    numbers = torch.empty(shape, dtype=dtype, device=device)
    if tensor.form is None:
        return (
            numbers.normal_(tensor.mean, tensor.spread, generator=generator)
            if tensor.spread
            else numbers.fill_(tensor.mean)
        )
    spread, mean = _EVEN[type(tensor.form)]
    scale = tensor.spread / spread
    if key.endswith("_scale"):
        return numbers.fill_(scale)
    if key.endswith("_zeros"):
        return numbers.fill_(-mean * scale)
    return numbers.random_(-128, 128, generator=generator)


@torch.no_grad()
def share_of_experts(backbone: Backbone, prompts: Sequence[int] = (90, 60), masks: int = 32) -> float:
    """The share of all experts that a first round of a guided picture hits, averaged over layers.

    Args:
        backbone: any.
        prompts: how many tokens each branch has, all branches with other ones.
        masks: how many masks follow in each.
    """
    config, weight = backbone.config, backbone.lm_head.weight
    routers = [module for module in backbone.modules() if isinstance(module, Router)]
    chosen: list[set[int]] = [set() for _ in routers]
    hooks = [
        router.register_forward_hook(
            lambda module, given, out, seen=seen: seen.update(out[0][-masks:].unique().tolist())
        )
        for router, seen in zip(routers, chosen, strict=True)
    ]
    for row, prompt in enumerate(prompts):
        text = [3 + (7 * i + 13 * row) % (config.image_token_offset - 3) for i in range(prompt)]
        ids = torch.tensor([[*text, *[2] * masks]], device=weight.device)
        context = PrefixCache(config, 1, ids.shape[1], weight.device, weight.dtype)
        backbone(ids, torch.arange(ids.shape[1], device=weight.device)[None], context, 0, None)
    for hook in hooks:
        hook.remove()
    return sum(map(len, chosen)) / len(chosen) / config.num_experts
