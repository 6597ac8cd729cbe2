"""Who decides where weights sit. The engine asks for a placement; a plain program or a host gives it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .checkpoint.component import Component
from .checkpoint.reading import map_file
from .checks import check_choice
from .options import WEIGHTS

PRECISIONS = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WorkingBytes = Callable[[torch.dtype], int]


@dataclass(frozen=True)
class Placement:
    """A component that is ready to run: the module, the device that computes and the dtype of its activations.

    Attributes:
        module: of the class that who asked for the part knows.
        resident: all weights lie on that device as they are used, and stay until the next placement is asked for, but
            for embeddings, which are looked up where they lie. False where a host may bring or patch layers one by one.
        moves: how often the weights have changed their place on the device. What keeps their addresses, as CUDA graphs
            do, is void once it has changed.
        before_moving: what the manager calls before it moves these weights or lets go of them, so that nothing keeps
            memory on their behalf; one list for all placements of a part. None where the manager calls nothing: then
            what keeps their addresses ends with the work it was made for.
    """

    module: Any
    device: torch.device
    dtype: torch.dtype
    resident: bool = False
    moves: int = 0
    before_moving: list[Callable[[], None]] | None = None


class ComponentManager(Protocol):
    """Gives components their place."""

    def place(self, part: str, component: Component, working_bytes: WorkingBytes) -> Placement:
        """Load a component where it is not loaded, bring it to its device and return it.

        Args:
            part: "backbone", "image_tokenizer", "sigvq", "decoder", "decoder-turbo" or "vae".
            component: what to load.
            working_bytes: dtype of activations -> memory that the coming work needs besides the weights.
        """
        ...


def could_fit(manager: ComponentManager, part: str, component: Component, working_bytes: WorkingBytes) -> bool:
    """Whether the device could have so much beside a part at best, with everything else out of the way.

    A manager that knows has a method `could_fit(part, component, working_bytes)`; without one everything could.
    """
    ask = getattr(manager, "could_fit", None)
    return True if ask is None else ask(part, component, working_bytes)


class OneDevice:
    """Every component on one device, loaded when first needed and kept: for plain programs.

    Args:
        device: where everything computes.
        dtype: of activations, and of weights that are not quantized; None keeps each file's own. Where one is given,
            the FP8 release is read as it.
        weights: one of `options.WEIGHTS`: "8-bit" and "4-bit" quantize weights while they are read.
        mapped: on the CPU, weights that a file has as they are used are slices of a map of it: processes that open one
            checkpoint have them in memory once. The files must stay as they are meanwhile.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        weights: str = "as stored",
        mapped: bool = False,
    ):
        check_choice("weights", weights, WEIGHTS)
        self.device, self.dtype, self.weights = torch.device(device), dtype, weights
        self._mapped = map_file if mapped and self.device.type == "cpu" else None
        self._placements: dict[str, Placement] = {}

    def place(self, part: str, component: Component, working_bytes: WorkingBytes) -> Placement:
        """As ComponentManager.place; working_bytes is not read."""
        if part not in self._placements:
            dtype = component.compute_dtype(self.dtype or component.dtype)
            asked = component.asked(self.weights, part, self.dtype, self.device)
            module = component.load(dtype, device=self.device, mapped=self._mapped, asked=asked)
            self._placements[part] = Placement(module, self.device, dtype, resident=True, before_moving=[])
        return self._placements[part]

    def could_fit(self, part: str, component: Component, working_bytes: WorkingBytes) -> bool:
        """As `placement.could_fit`: what is free on a GPU of NVIDIA's or AMD's. What a CPU has is not asked."""
        if self.device.type != "cuda":
            return True
        dtype = component.compute_dtype(self.dtype or component.dtype)
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        free = torch.cuda.mem_get_info(self.device)[0] + kept
        return working_bytes(dtype) <= free - (0 if part in self._placements else component.bytes(dtype))

    def release(self, part: str) -> None:
        """Drop a component's weights; it is read again when next needed."""
        placement = self._placements.pop(part, None)
        for call in placement.before_moving or () if placement else ():
            call()
