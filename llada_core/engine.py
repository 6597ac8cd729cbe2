"""LLaDAUni: open a checkpoint, then encode, generate, answer and decode. The engine's public API."""

import logging
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch

from .backbone import attention_kernels
from .backbone.attention_kernels import KINDS as ATTENTION_KINDS
from .backbone.config import BackboneConfig
from .backbone.cuda_graphs import SPARE as GRAPH_BYTES
from .backbone.cuda_graphs import GraphStore
from .backbone.experts import ExpertBank
from .backbone.head import Head
from .backbone.keys import open_backbone
from .backbone_tasks import BackboneTasks
from .checkpoint.component import Component, described
from .checkpoint.layout import Layout
from .checkpoint.weights import PickledTensors, read_json
from .checks import PIXELS, check_count, check_kind, check_optional, check_seed
from .decoder.conditioning import CODES_KEY, open_embedder
from .decoder.decode import (
    check_grid,
    decode_latents,
    decoder_working_bytes,
    encode_picture,
    open_decoder,
    open_vae,
    sample_latents,
    vae_working_bytes,
)
from .errors import CheckpointError, InputError
from .image_tokens import PATCH, ImageTokens, check_extent
from .libraries import without_partial_torchvision
from .lists import broadcast
from .options import Decoding
from .placement import PRECISIONS, ComponentManager, OneDevice, Placement, WorkingBytes
from .preview_colours import colour_chart, colours, fit_latents
from .progress import Progress, ProgressCallback, report, shifted
from .quantization.formats import Format
from .quantization.modules import QuantizedLinear, StoredWeight
from .sampling.interleaved import Story
from .sampling.tasks import Answer, Generation
from .vision.preprocess import Normalisation, PixelBudgets, check_batch, check_way, prepare, prepared_size
from .vision.siglip_vq import encode_working_bytes, open_siglip_vq
from .vocabulary import Vocabulary

__all__ = [
    "ATTENTION_KINDS",
    "GRAPH_BYTES",
    "PRECISIONS",
    "Answer",
    "Component",
    "ComponentManager",
    "ExpertBank",
    "Format",
    "Generation",
    "Head",
    "LLaDAUni",
    "Layout",
    "OneDevice",
    "Placement",
    "QuantizedLinear",
    "StoredWeight",
    "Story",
    "WorkingBytes",
]

log = logging.getLogger(__name__)

# Images whose features wait for the decoder at once: they are a thousand times as large as codes, and on a small card
# the embedder and the decoder may have to make room for each other.
_FEATURES_AT_ONCE = 8

MOST_DRAWN = 2**26  # pixels of all token grids that are drawn at once, 800 MB


class LLaDAUni(BackboneTasks):
    """One LLaDA2.0-Uni checkpoint. Opening checks every file's header and reads no weights; parts load when needed.

    Args:
        folder: a checkpoint in the released layout, bf16 or FP8, whole or with some parts only.
        manager: who loads parts and says where they sit; by default everything on the CPU in the files' own dtype.
        attention: the backbone's kernel: "auto" (sdpa), "sdpa", "flash_attention_2" or "eager".

    Raises:
        CheckpointError: a file that is missing where its part is not missing whole, truncated, of other shapes, with
            unknown or absent tensors; a tokenizer without a special token.
        InputError: flash_attention_2 without its package.

    Example:
        >>> model = LLaDAUni("models/llada_uni/LLaDA2.0-Uni", OneDevice("cuda"))
        >>> drawn = model.generate("a red fox in the snow", 1024, 1024)
        >>> image = model.decode(drawn.tokens, Decoding(turbo=True))[0]  # float32 [1024, 1024, 3] in 0...1
    """

    def __init__(self, folder: Path | str, manager: ComponentManager | None = None, attention: str = "auto"):
        self.layout = Layout.open(Path(folder))
        self.manager = manager or OneDevice()
        self._attend = attention_kernels.choose(attention)
        self._graphs = GraphStore()
        self._palette: torch.Tensor | None = None
        self._latent_colours: torch.Tensor | None = None
        self._budgets = PixelBudgets()
        self._warned = False
        self.config = BackboneConfig.from_dict(read_json("backbone", self.layout.root / "config.json"))
        tokenizer = self.layout.root / "tokenizer.json"
        self.vocabulary = Vocabulary.open(tokenizer, self.config.image_token_offset, self.config.vocab_size)
        self._components: dict[str, Component] = {"backbone": open_backbone(self.layout.backbone_files(), self.config)}
        with without_partial_torchvision():
            self._open_pixel_parts()
        log.info("checkpoint %s: %s", self.layout.root.name, described(self._components, self.layout.missing))
        if not self.layout.has("sigvq"):
            log.info("without its SigVQ embedding the token grid has no colours, and no preview is drawn of it")

    def _open_pixel_parts(self) -> None:
        """Match what goes between pixels and tokens with its files, as far as the checkpoint has it."""
        if self.layout.has("image_tokenizer"):
            folder = self.layout.require("image_tokenizer")
            preprocessor = read_json("image_tokenizer", folder / "preprocessor_config.json")
            self._budgets = PixelBudgets.from_config(preprocessor)
            self._normalise = Normalisation.from_config(preprocessor)
            self._components["image_tokenizer"] = open_siglip_vq(folder)
            self._check_codebook(self._components["image_tokenizer"].module.codebook_size, "image_tokenizer")
        if self.layout.has("sigvq"):
            self._components["sigvq"] = open_embedder(self.layout.require("sigvq"))
            embedder = self._components["sigvq"].module
            self._check_codebook(embedder.codes.num_embeddings, "image_tokenizer/sigvq_embedding.pt")
            for part in filter(self.layout.has, ("decoder", "decoder-turbo")):
                self._components[part] = open_decoder(self.layout.require(part), embedder.outer.out_features)
        if self.layout.has("vae"):
            self._components["vae"] = open_vae(self.layout.require("vae"))

    @property
    def components(self) -> dict[str, Component]:
        """The parts this checkpoint has, by name."""
        return dict(self._components)

    def palette(self) -> torch.Tensor | None:
        """A colour for each image code, uint8 [codes, 3], from its SigVQ embedding; None without that file.

        Computed once and kept: 16,384 codes take a fraction of a second.
        """
        if self._palette is None and self.layout.has("sigvq"):
            source = cast(PickledTensors, self._components["sigvq"].source)  # the one part that is a .pt file
            ((_, embedding),) = source.read([CODES_KEY])
            self._palette = colours(embedding)
        return self._palette

    def latent_colours(self) -> torch.Tensor | None:
        """The map from the decoder's latents to colours, float32 [channels + 1, 3] (`preview_colours.fit_latents`).

        Fitted once, by encoding a chart with this checkpoint's VAE, which it loads; None without a VAE.
        """
        if self._latent_colours is None and self.layout.has("vae"):
            chart = colour_chart()
            size = (chart.shape[0] // PIXELS, chart.shape[1] // PIXELS)
            placement = self._place("vae", _of_grid(vae_working_bytes, size))
            latents = encode_picture(placement.module, chart, placement.device, placement.dtype)
            self._latent_colours = fit_latents(latents, chart)
        return self._latent_colours

    def preview(self, tokens: ImageTokens, cell: int = PATCH) -> list[torch.Tensor]:
        """Token grids as pictures: a square of one colour for each code.

        Args:
            tokens: grids of this checkpoint's codebook.
            cell: pixels of a square's side, 1 to 64.

        Returns:
            A float32 [h * cell, w * cell, 3] in 0...1 for each grid.

        Raises:
            InputError: a `cell` beyond its range, or one that makes more than 2**26 pixels of all grids.
        """
        self.layout.require("sigvq")
        check_count("cell", cell, 1, 64)
        palette = cast(torch.Tensor, self.palette()).float() / 255
        grids = tokens.for_codebook(self.codebook_size).grids
        drawn = sum(grid.numel() for grid in grids) * cell**2
        if drawn > MOST_DRAWN:
            expected, remedy = f"at most {MOST_DRAWN}", "Choose a smaller cell, or take fewer images."
            raise InputError("cell", f"{cell}, which makes {drawn} pixels", expected, remedy)
        return [palette[grid].repeat_interleave(cell, 0).repeat_interleave(cell, 1) for grid in grids]

    def encode(
        self,
        image: torch.Tensor | list[torch.Tensor],
        purpose: str = "edit",
        fit: str = "cover",
        pixels: int = 0,
        progress: ProgressCallback | None = None,
    ) -> Any:
        """Image to tokens with SigLIP-VQ (docs/model.md, Image preprocessing).

        Args:
            image: float32 [batch, height, width, 3 or 4] in 0...1; alpha is composited over white. Or a list of such.
            purpose: "edit" (a reference to edit) or "understand" (a picture to question); they size it differently.
            fit: "cover" resizes before the crop, "crop" only crops (what the reference implementation does).
            pixels: budget of the area after resizing; 0 takes the checkpoint's.
            progress: called before each image, and after each block of the vision tower.

        Returns:
            ImageTokens with as many grids as images. Several images share the smaller budget of the checkpoint. Of a
            list a list, each as if it were alone.
        """
        self.layout.require("image_tokenizer")
        check_way(purpose, fit, pixels)
        each, listed = broadcast(image=image)
        batches = [one["image"] for one in each]
        for batch in batches:
            check_batch(batch)
        check_extent("image", [(1, 1)] * sum(map(len, batches)))
        sizes = [prepared_size((b.shape[1], b.shape[2]), purpose, self._budgets, len(b) > 1, pixels) for b in batches]
        largest = max(height * width for height, width in sizes)
        pictures = ((picture, len(batch) > 1) for batch in batches for picture in batch)
        count, grids = sum(map(len, batches)), []
        for done, (picture, several) in enumerate(pictures):
            before = Progress(done, count, "encode")
            report(progress, before)
            # One at a time: a batch that is resized may be many times as large as it was.
            prepared = self._normalise(prepare(picture, purpose, fit, self._budgets, several, pixels))
            placement = self._place(
                "image_tokenizer", lambda config, dtype: encode_working_bytes(largest, dtype, config)
            )
            grids.append(
                placement.module.encode(prepared, placement.device, placement.dtype, partial(report, progress, before))
            )
        report(progress, Progress(count, count, "encode"))
        left = iter(grids)
        tokens = [ImageTokens(tuple(islice(left, len(batch))), self.codebook_size) for batch in batches]
        return tokens if listed else tokens[0]

    def decode(
        self,
        tokens: ImageTokens,
        decoding: Decoding | None = None,
        progress: ProgressCallback | None = None,
        seed: list[int] | None = None,
    ) -> list[torch.Tensor]:
        """Tokens to pixels (docs/model.md, Decoding).

        Args:
            tokens: grids of this checkpoint's codebook.
            decoding: decoder, rounds and seed; image i uses seed + i.
            progress: called after each round, stages "decoder" and "pixels".
            seed: one of each image, in place of those of `decoding`. A picture is what it is alone with its seed.

        Returns:
            A float32 [32 h, 32 w, 3] in 0...1 for each grid, on the CPU.

        Raises:
            InputError: as many seeds as there are not images; tokens of another codebook; a grid that is too large.
        """
        check_kind("tokens", tokens, ImageTokens, "ImageTokens", "Encode or sample an image first.")
        check_optional("decoding", decoding, Decoding)
        decoding = decoding or Decoding()
        tokens = tokens.for_codebook(self.codebook_size)
        seeds = [decoding.seed + index for index in range(len(tokens.grids))] if seed is None else list(seed)
        if len(seeds) != len(tokens.grids):
            found, expected = f"{len(seeds)} beside {len(tokens.grids)} images", "one of each image"
            raise InputError("seed", found, expected, "Hand over as many, or none and a seed in `decoding`.")
        for one in seed or ():
            check_seed(one)
        part = "decoder-turbo" if decoding.turbo else "decoder"
        for needed in ("sigvq", part, "vae"):
            self.layout.require(needed)
        for grid in tokens.grids:
            check_grid(*grid.shape)
        latents: list[torch.Tensor] = []
        for first in range(0, len(tokens.grids), _FEATURES_AT_ONCE):
            part_of = slice(first, first + _FEATURES_AT_ONCE)
            features = self.features(ImageTokens(tokens.grids[part_of], tokens.codebook_size))
            for size, given in zip(tokens.sizes[part_of], features, strict=True):
                index = len(latents)
                placement = self._place(part, _of_grid(decoder_working_bytes, size))
                callback = shifted(progress, index, len(tokens.grids))
                where = placement.device, placement.dtype
                latents.append(sample_latents(placement.module, given, size, decoding, seeds[index], *where, callback))
        images = []
        for index, (size, latent) in enumerate(zip(tokens.sizes, latents, strict=True)):
            report(progress, Progress(index, len(latents), "pixels"))
            placement = self._place("vae", _of_grid(vae_working_bytes, size))
            images.append(decode_latents(placement.module, latent, placement.device, placement.dtype)[0])
        report(progress, Progress(len(latents), len(latents), "pixels"))
        return images

    def features(self, tokens: ImageTokens) -> list[torch.Tensor]:
        """What the decoders are conditioned on (docs/model.md, Decoding): [4·h·w, width] for each grid, on the CPU."""
        tokens = tokens.for_codebook(self.codebook_size)
        self.layout.require("sigvq")
        for grid in tokens.grids:
            check_grid(*grid.shape)
        largest, trained = max(grid.numel() for grid in tokens.grids), self._budgets.edit // PATCH**2
        if largest > trained and not self._warned:
            self._warned = True
            log.warning("decoding %d tokens; up to %d were trained, larger pictures lose detail", largest, trained)
        embedder = self._place("sigvq")
        return [embedder.module(grid.to(embedder.device)).cpu() for grid in tokens.grids]

    def _place(
        self, part: str, working_bytes: Callable[[Any, torch.dtype], int] = lambda config, dtype: 0
    ) -> Placement:
        """A part, ready to run. working_bytes: (the part's configuration, dtype of activations) -> bytes."""
        component = self._components[part]
        config = getattr(component.module, "config", None)
        return self.manager.place(part, component, lambda dtype: working_bytes(config, dtype))

    def _check_codebook(self, size: int, part: str) -> None:
        if size != self.codebook_size:
            found, expected = f"{size} codes", f"the {self.codebook_size} image codes of config.json"
            remedy = "The parts belong to different models; download the checkpoint again."
            raise CheckpointError(part, found, expected, remedy)


def _of_grid(working_bytes: Callable[..., int], size: tuple[int, int]) -> Callable[[Any, torch.dtype], int]:
    return lambda config, dtype: working_bytes(*size, dtype, config)
