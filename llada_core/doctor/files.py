"""Without a weight: folder, headers against configurations, and the tokenizer (docs/model.md, Files)."""

from pathlib import Path

from ..backbone.config import BackboneConfig
from ..backbone.keys import open_backbone
from ..checkpoint.component import Component
from ..checkpoint.layout import Layout
from ..checkpoint.weights import read_json
from ..decoder.conditioning import open_embedder
from ..decoder.decode import open_decoder, open_vae
from ..vision.siglip_vq import open_siglip_vq
from ..vocabulary import SPECIAL, Vocabulary
from .findings import Findings

# Ids of the released tokenizer, and its sizes (docs/model.md, Tokens and prompts; Backbone).
RELEASED_SPECIAL = {
    "<|endoftext|>": 156892,
    "<|mask|>": 156895,
    "<|image|>": 156901,
    "<|/image|>": 156902,
    "<boi>": 156904,
}
RELEASED_SIZES = {"vocab_size": 173_568, "image_token_offset": 157_184, "hidden_size": 2048, "num_hidden_layers": 20}
TASKS = {
    "image_tokenizer": "editing and questions about pictures",
    "sigvq": "decoding, and previews of tokens",
    "decoder": "the normal decoder",
    "decoder-turbo": "the turbo decoder",
    "vae": "decoding",
}


def examine_files(folder: Path, findings: Findings) -> tuple[dict[str, Component], BackboneConfig | None]:
    """Open every part by its headers.

    Returns:
        The parts that opened, and the backbone's configuration where it could be read.
    """
    components: dict[str, Component] = {}
    config = None
    layout = None
    with findings.part("folder"):
        layout = Layout.open(folder)
    if layout is None:
        return components, None
    with findings.part("config.json"):
        config = BackboneConfig.from_dict(read_json("backbone", layout.root / "config.json"))
        _sizes(config, findings)
    if config is not None:
        with findings.part("backbone files"):
            components["backbone"] = open_backbone(layout.backbone_files(), config)
        with findings.part("tokenizer"):
            _tokenizer(layout.root / "tokenizer.json", config, findings)
    openers = {"image_tokenizer": open_siglip_vq, "sigvq": open_embedder, "vae": open_vae}
    for part, task in TASKS.items():
        if not layout.has(part):
            missing = ", ".join(layout.missing[part])
            findings.add("look", part, f"not there ({missing})", f"It is needed for {task}; all else works.")
        elif part in openers:
            with findings.part(part):
                components[part] = openers[part](layout.require(part))
        elif "sigvq" in components:
            with findings.part(part):
                features = components["sigvq"].module.outer.out_features
                components[part] = open_decoder(layout.require(part), features)
    for part, component in components.items():
        tensors, size = len(component.slots), sum(_bytes(component))
        findings.add("ok", part, f"{tensors} tensors fit config.json, {size / 1e9:.3g} GB as {_short(component.dtype)}")
    if config is not None:
        _codebooks(components, config, findings)
    return components, config


def _bytes(component: Component):
    yield component.bytes(component.dtype)


def _short(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sizes(config: BackboneConfig, findings: Findings) -> None:
    other = {name: getattr(config, name) for name, value in RELEASED_SIZES.items() if getattr(config, name) != value}
    if not other:
        findings.add("ok", "sizes", "those of the released LLaDA2.0-Uni")
    else:
        shown = ", ".join(f"{name} {value:,}" for name, value in other.items())
        findings.add("look", "sizes", shown, "Not the released model's; right for a miniature or a model of your own.")


def _tokenizer(path: Path, config: BackboneConfig, findings: Findings) -> None:
    vocabulary = Vocabulary.open(path, config.image_token_offset, config.vocab_size)
    found = {token: vocabulary.id_of(token) for token in SPECIAL.values()}
    released = all(getattr(config, name) == value for name, value in RELEASED_SIZES.items())
    if released:
        other = [f"{token} is {found[token]}" for token, known in RELEASED_SPECIAL.items() if found[token] != known]
        if other:
            advice = "The sizes are the release's and the ids are not: tokenizer.json belongs to another model."
            findings.add("wrong", "special tokens", ", ".join(other), advice)
            return
    largest = vocabulary.largest_dimension
    findings.add("ok", "special tokens", f"all {len(found)} there, pictures up to {largest} tokens a side")
    text = "A red fox, two circles."
    again = vocabulary.decode(vocabulary.encode(text)).strip()
    if again != text:
        advice = "Text does not survive the tokenizer; download tokenizer.json again."
        findings.add("wrong", "tokenizer", f"{text!r} comes back as {again!r}", advice)


def _codebooks(components: dict[str, Component], config: BackboneConfig, findings: Findings) -> None:
    codes = config.vocab_size - config.image_token_offset
    sizes = {}
    if "image_tokenizer" in components:
        sizes["image_tokenizer"] = components["image_tokenizer"].module.codebook_size
    if "sigvq" in components:
        sizes["sigvq"] = components["sigvq"].module.codes.num_embeddings
    for part, size in sizes.items():
        if size != codes:
            advice = "The parts belong to different models; download the checkpoint again."
            findings.add("wrong", part, f"{size} codes, and config.json has {codes}", advice)
