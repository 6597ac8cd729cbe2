"""Components under the host's memory management: each in its own ModelPatcher, loaded by load_models_gpu."""

import logging
from weakref import WeakValueDictionary

import comfy.model_management as management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...llada_core.checks import check_choice
from ...llada_core.engine import PRECISIONS, Component, Placement, WorkingBytes
from .casting import fully_resident, make_castable, move_uncast_parameters

log = logging.getLogger(__name__)


class ModuleHolder(nn.Module):
    """A component as the host's patcher wants it: a plain module that takes the host's attributes.

    Library models have a read-only `device`, which the patcher would set.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


class HostComponentManager:
    """Gives the engine's components their place in the host (see llada_core.placement.ComponentManager).

    Args:
        precision: "auto", "bf16", "fp16" or "fp32". auto keeps the files' type where the device computes in it.

    Raises:
        InputError: another precision; ComfyUI 0.3.64 lets any text through.
    """

    def __init__(self, precision: str):
        check_choice("precision", precision, tuple(PRECISIONS))
        self._dtype = PRECISIONS[precision]
        self._patchers: dict[str, tuple[ModelPatcher, torch.dtype]] = {}
        self._said = False
        # What the host's own classes hold of the checkpoint, for as long as anybody uses it.
        self.shared: WeakValueDictionary[str, object] = WeakValueDictionary()

    @property
    def precision(self) -> torch.dtype | None:
        """The type that weights are to have; None where that is left to files and device."""
        return self._dtype

    def patchers(self) -> list[ModelPatcher]:
        """The host's models of the parts that are loaded."""
        return [patcher for patcher, _ in self._patchers.values()]

    def place(self, part: str, component: Component, working_bytes: WorkingBytes) -> Placement:
        """Load where needed, make room, and bring to the device as much as the host allows."""
        if part not in self._patchers:
            self._patchers[part] = self._load(part, component)
        patcher, dtype = self._patchers[part]
        management.load_models_gpu([patcher], memory_required=working_bytes(dtype))
        move_uncast_parameters(patcher.model, patcher.load_device)
        resident = fully_resident(patcher.model, patcher.load_device)
        if part == "backbone" and not resident and not self._said:
            self._said = True
            log.info("LLaDA-Uni: not all of the backbone stays on the device; layers are brought there in every round")
        return Placement(patcher.model.module, patcher.load_device, dtype, resident)

    def _load(self, part: str, component: Component) -> tuple[ModelPatcher, torch.dtype]:
        vae = part == "vae"
        device = management.vae_device() if vae else management.get_torch_device()
        offload = management.vae_offload_device() if vae else management.unet_offload_device()
        dtype = component.compute_dtype(self._dtype or _native(component, device))
        log.info("LLaDA-Uni: reading %s as %s, %.3g GB", part, dtype, component.bytes(dtype) / 1e9)
        # The host's log names a model by its class.
        held = type(f"LLaDA-Uni {part}", (ModuleHolder,), {})(make_castable(component.load(dtype, _bar())))
        return ModelPatcher(held, load_device=device, offload_device=offload), dtype


def _native(component: Component, device: torch.device) -> torch.dtype:
    """The files' type where the device computes in it, else the nearest that it does."""
    stored = component.dtype
    if management.is_device_cpu(device):
        # Half types are slow on a CPU. Where float32 would take over half of the memory, slow is better than none.
        room = management.get_total_memory(device) / 2
        return torch.float32 if component.bytes(torch.float32) <= room else stored
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
