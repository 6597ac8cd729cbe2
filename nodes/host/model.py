"""What Load LLaDA-Uni gives: the engine's model as the host's cache and memory management want to see one."""

import weakref
from pathlib import Path

from comfy.model_patcher import ModelPatcher

from ...llada_core.checks import check_choice
from ...llada_core.engine import ATTENTION_KINDS, PRECISIONS, LLaDAUni
from ...llada_core.options import WEIGHTS
from .component_manager import HostComponentManager
from .folders import checkpoint_fingerprint, checkpoint_path
from .heap import trim_when_gone
from .recent import Recent


class HostedModel(LLaDAUni):
    """A checkpoint whose parts live under the host's memory management.

    Args:
        folder, attention: as LLaDAUni takes them.
        manager: who holds the parts; several models may share one.

    Attributes:
        recent: what nodes drew of late in which chance had no part.
    """

    manager: HostComponentManager

    def __init__(self, folder: Path, manager: HostComponentManager, attention: str):
        super().__init__(folder, manager, attention)
        self.recent = Recent()

    def is_dynamic(self) -> bool:
        """True: what is loaded of it is the host's own to unload, so dropping it from a cache under pressure frees
        nothing that the host could not have, and costs reading the checkpoint again (comfy_execution/caching.py)."""
        return True

    def get_models(self) -> list[ModelPatcher]:
        """The parts that are loaded, as the host tracks which models a prompt uses."""
        return self.manager.patchers()


class _SharedManagers:
    """The managers in use, by what decides the bytes of their parts; one goes with the last model that uses it.

    The host opens a checkpoint for each Load LLaDA-Uni of a graph, and anew when a widget changes. The parts of two
    such models are the same where the files, their form and their type are.
    """

    def __init__(self):
        self._managers: weakref.WeakValueDictionary[tuple, HostComponentManager] = weakref.WeakValueDictionary()

    def get(self, key: tuple, precision: str, weights: str) -> HostComponentManager:
        manager = self._managers.get(key)
        if manager is None:
            self._managers[key] = manager = HostComponentManager(precision, weights)
            trim_when_gone(manager)
        return manager


# The only state of the process that this pack keeps: nodes are classes, and the host hands nothing from one to another.
_SHARED = _SharedManagers()


def open_checkpoint(name: str, precision: str, attention: str, weights: str) -> HostedModel:
    """Open a listed checkpoint. Raises InputError and CheckpointError as `checkpoint_path` and LLaDAUni do."""
    check_choice("precision", precision, tuple(PRECISIONS))
    check_choice("attention", attention, ATTENTION_KINDS)
    check_choice("weights", weights, WEIGHTS)
    folder = checkpoint_path(name)
    key = (str(folder.resolve()), checkpoint_fingerprint(name), precision, weights)
    return HostedModel(folder, _SHARED.get(key, precision, weights), attention)
