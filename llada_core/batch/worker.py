"""What a worker does: it holds the checkpoint on its device and takes one batch after the other."""

import logging
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..engine import PRECISIONS, LLaDAUni, OneDevice
from ..errors import InputError
from .rows import pack_fault, pack_result, unpack
from .tasks import run

log = logging.getLogger(__name__)

TRIES = 2  # of a batch whose worker ends before it is done
_NOTHING_MORE = 70  # exit status of a worker whose device has failed (sysexits.h: an internal error)


@dataclass(frozen=True)
class Settings:
    """How a worker opens the checkpoint.

    Attributes:
        checkpoint: the folder, by the same path on every machine.
        device: "cuda" or "cpu"; a worker sees no GPU but its own.
        precision: one of `engine.PRECISIONS`.
        weights: one of `options.WEIGHTS`.
        parts: what to load before the first batch.
    """

    checkpoint: str
    device: str
    precision: str = "auto"
    weights: str = "as stored"
    parts: tuple[str, ...] = ()


class Worker:
    """A checkpoint on one device.

    Args:
        settings: how to open it.
        begin: told a batch's key before the batch is run; returns how often that batch has been begun by now, by this
            worker or by one that ended in the middle of it.
    """

    def __init__(self, settings: Settings, begin: Callable[[str], int]):
        self._begin, self._fault = begin, ""
        self._name = f"{platform.node()}:{os.getpid()}"
        try:
            self._model = open_model(settings)
        except Exception as error:  # what keeps a worker from starting is no request's fault: it stops the run
            known = isinstance(error, InputError)
            self._fault = str(error) if known else f"{type(error).__name__}: {error}"
            log.error("this worker cannot start: %s", self._fault, exc_info=None if known else error)

    def __call__(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The results of a batch's row. None at all where the batch has ended its worker too often."""
        if self._fault:
            return [pack_fault(self._fault)]
        if self._begin(row["key"]) > TRIES:
            return []
        try:
            results = run(self._model, unpack(row), self._name)
        except RuntimeError:
            log.exception("this worker ends, and another takes its place")
            os._exit(_NOTHING_MORE)
        return [pack_result(result) for result in results]


def open_model(settings: Settings) -> LLaDAUni:
    """The checkpoint, with the parts that will be needed in their place."""
    manager = OneDevice(settings.device, PRECISIONS[settings.precision], settings.weights, mapped=True)
    model = LLaDAUni(settings.checkpoint, manager)
    for part in settings.parts:
        if part in model.components:
            manager.place(part, model.components[part], lambda dtype: 0)
    return model
