"""Parts under the host's DynamicVRAM: weights in its own pages on the card, brought when used, taken back when needed.

The host gives every large layer an address of its own on the card (`_v`) and puts memory behind it when the layer is
used; under pressure it takes the memory away, the least used model's first, and never copies anything back: weights
are slices of files, or copies in main memory. Everything here is looked up when it is used, as older hosts have none.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.ops
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from .casting import CastEmbedding, CastHead, castable_layers


def file_slices(path: Path) -> Mapping[str, torch.Tensor]:
    """A safetensors file's tensors by key, as slices of a map that the host reads from disk to the card by itself."""
    return comfy.utils.load_safetensors(str(path))[0]


def pages_weights(device: torch.device) -> bool:
    """Whether the host manages weights for this device in pages."""
    memory = _host_module("memory_management")
    return getattr(memory, "aimdo_enabled", False) and not management.is_device_cpu(device)


@dataclass(frozen=True)
class Residency:
    """Bytes of a part's large layers: on the card to stay, of them brought there just now, and not on it."""

    held: int
    brought: int
    away: int


class _Queue(list):
    """An entry in the host's list of prefetched layers."""

    def close(self) -> None:
        """Asked for by newer hosts when a node has ended; there is nothing to close."""


class Hold:
    """Layers of one part, kept on the card while it works, so that CUDA graphs may rely on them.

    The host's pages stay where they are while they are pinned, and a layer that is held shows its weights there. Pins
    are given back when another part is placed, and by the host itself when a node has ended, however it ends: it asks
    its list of prefetched layers. What is shown then is not to be used until the part is placed again.
    """

    def __init__(self):
        self._queue: _Queue | None = None
        self._layers: list[Any] = []
        self._elsewhere: list[tuple[Any, str, nn.Parameter]] = []  # layer, name, what it showed before

    def take(self, patcher: ModelPatcher, room: int, beside: int = 0) -> Residency:
        """Bring layers to the card and pin them there, in the order of their addresses, within `room` bytes.

        Head and embeddings come last: of them the rows used are sent where they are not on the card. Embeddings come
        only where `beside` bytes are left next to them, for what gains more by it. Where not all layers find room, the
        others get none of the host's pages, as fetching them would drive out what is held.
        """
        self.give_back()
        device = patcher.load_device
        prefetch = _host_module("model_prefetch")
        layers: list[Any] = [layer for layer in castable_layers(patcher.model) if hasattr(layer, "_v")]
        layers.sort(key=lambda layer: (_sends_rows(layer), layer._v[1]))
        total = sum(_size(layer) for layer in layers)
        casts = all(hasattr(comfy.ops, f"{name}_with_vbar") for name in ("cast_modules", "resolve_cast_module"))
        if not casts or not hasattr(prefetch, "cleanup_prefetched_modules"):
            return Residency(0, 0, total)
        self._queue = _Queue([(None, (patcher.model, self._layers))])
        prefetch.PREFETCH_QUEUES.append(self._queue)
        brought = 0
        for layer in layers[: _fitting(layers, room, beside)]:
            stream = comfy.ops.cast_modules_with_vbar([layer], None, device, None, True)
            management.sync_stream(device, stream)
            if layer._prefetch["signature"] is None:  # no memory for it, whatever was reckoned
                del layer._prefetch
                break
            brought += _size(layer) * (not layer._prefetch["resident"])
            self._layers.append(layer)
            self._show(layer, device)
        pages: Any = layers[0]._v[0] if layers else None
        if len(self._layers) < len(layers) and hasattr(pages, "set_watermark_limit"):
            end = max((layer._v[1] + _size(layer) for layer in self._layers), default=pages.base_addr)
            pages.set_watermark(end - pages.base_addr)
            pages.set_watermark_limit(end - pages.base_addr)
        held = sum(_size(layer) for layer in self._layers)
        return Residency(held, brought, total - held)

    def _show(self, layer: Any, device: torch.device) -> None:
        """Let a layer whose weights were brought be an ordinary one with its weights on the card."""
        dtypes = [tensor.dtype if tensor is not None else None for tensor in (layer.weight, layer.bias)]
        tensors = comfy.ops.resolve_cast_module_with_vbar(layer, dtypes[0], device, dtypes[1], None, False)
        for name, tensor in zip(("weight", "bias"), tensors, strict=True):
            if tensor is not None:
                self._elsewhere.append((layer, name, layer._parameters[name]))
                layer._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        layer.comfy_cast_weights = False

    def give_back(self) -> None:
        """Unpin what is still held, and show weights where they are without the host's pages."""
        for layer, name, parameter in self._elsewhere:
            layer._parameters[name] = parameter
            layer.comfy_cast_weights = True
        if self._queue is not None:
            prefetch = _host_module("model_prefetch")
            prefetch.cleanup_prefetched_modules(*self._queue[0][1])
            prefetch.PREFETCH_QUEUES[:] = [queue for queue in prefetch.PREFETCH_QUEUES if queue is not self._queue]
        self._queue, self._layers, self._elsewhere = None, [], []


def _size(layer: Any) -> int:
    """Bytes of the host's pages that are a layer's."""
    return layer._v[2]


def _sends_rows(layer: Any) -> int:
    """Whether a layer that is away sends the rows used: an embedding (2) fewer of them than the head (1)."""
    return 2 if isinstance(layer, CastEmbedding) else int(isinstance(layer, CastHead))


def make_free(patcher: ModelPatcher, wanted: int) -> None:
    """Have pages of other models go, those used longest ago first, until so many bytes are free on the card.

    The host gives up pages as memory is asked for, but by then a capture of a graph, or a library that looks how much
    is free, has found none.
    """
    device = patcher.load_device
    for loaded in reversed(management.current_loaded_models):
        short = wanted - management.get_free_memory(device)
        if short <= 0:
            return
        model = loaded.model
        pages = None if model is None else getattr(model.model, "dynamic_vbars", {}).get(device)
        if pages is not None and model.model is not patcher.model:
            pages.free_memory(short)


def _fitting(layers: Sequence[Any], room: int, beside: int) -> int:
    """How many of the first layers fit, with what the others need: one computes while the next is copied."""
    used = [0, *accumulate(_size(layer) for layer in layers)]
    for count in range(len(layers), 0, -1):
        passing = [_size(layer) for layer in layers[count:] if not _sends_rows(layer)]
        left = room - used[count] - 2 * max(passing, default=0)
        if left >= (beside if isinstance(layers[count - 1], CastEmbedding) else 0):
            return count
    return 0


class PinnedCopies:
    """Weights of a part that are no slices of files, laid out and pinned as the host's own copies for the card are.

    The host would make a second, pinned copy of each: it takes one that a layer shows as its own.
    """

    def __init__(self, module: nn.Module):
        self._pinned: list[torch.Tensor] = []
        memory = _host_module("memory_management")
        if not hasattr(management, "unpin_memory"):
            return
        for layer in castable_layers(module):
            tensors = [layer.weight, layer.bias]
            if any(tensor is not None and _is_file_slice(tensor) for tensor in tensors):
                continue
            whole = torch.empty(memory.vram_aligned_size(tensors), dtype=torch.uint8)
            for name, old, new in zip(
                ("weight", "bias"), tensors, memory.interpret_gathered_like(tensors, whole), strict=True
            ):
                if old is not None:
                    new.copy_(old)
                    layer._parameters[name] = nn.Parameter(new, requires_grad=False)
            if management.pin_memory(whole):
                self._pinned.append(whole)
            vars(layer)["_pins"] = {"weights": {"pin": whole, "registered": True}}

    def __del__(self):
        for whole in self._pinned:
            management.unpin_memory(whole)


def _is_file_slice(tensor: torch.Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "_comfy_tensor_file_slice", None) is not None


def _host_module(name: str) -> Any:
    """A module of comfy; None on hosts that lack it."""
    return importlib.import_module(f"comfy.{name}") if importlib.util.find_spec(f"comfy.{name}") else None
