"""How many workers, and what each takes of a machine: computed from numbers alone, so that it can be tried dry."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import check_choice, check_count
from ..errors import InputError

DEVICES = ("auto", "cuda", "cpu")
MAX_WORKERS = 4096
_PARTS = 10_000  # Ray shares out a device in so many parts


@dataclass(frozen=True)
class Machine:
    """What a machine has: processors and GPUs."""

    cpus: float
    gpus: int = 0


@dataclass(frozen=True)
class Place:
    """Where a worker goes: the machine and its GPU, both counted from 0; no GPU is the processor."""

    machine: int
    gpu: int | None


@dataclass(frozen=True)
class Plan:
    """Workers, all alike.

    Attributes:
        device: "cuda" or "cpu".
        cpus, gpus: what each takes of its machine; below 1 it is a share of one. Above 1 they are whole.
        places: one for each worker, as they fit; Ray may fill the machines in another order.
    """

    device: str
    cpus: float
    gpus: float
    places: tuple[Place, ...]

    @property
    def workers(self) -> int:
        """How many."""
        return len(self.places)

    def __str__(self) -> str:
        each = f"{self.gpus:g} GPU and {self.cpus:g} CPU" if self.gpus else f"{self.cpus:g} CPU"
        machines = len({place.machine for place in self.places})
        where = f" on {machines} machines" if machines > 1 else ""
        return f"{self.workers} worker{'s' * (self.workers != 1)}{where}, {each} each"


def plan(machines: Sequence[Machine], workers: int | None = None, device: str = "auto") -> Plan:
    """Workers for the machines that there are.

    Args:
        machines: of the cluster; nothing assumes how many, or that they are alike.
        workers: None for one on each GPU, or where there is none, one on each machine. More than there are GPUs share
            them: each holds the whole checkpoint, so a GPU needs the memory for all of its workers.
        device: "auto" takes GPUs where there are any.

    Raises:
        InputError: GPUs are asked for and there is none; no machine at all.
    """
    check_choice("device", device, DEVICES)
    if workers is not None:
        check_count("workers", workers, 1, MAX_WORKERS)
    gpus = sum(machine.gpus for machine in machines)
    if device == "cuda" and not gpus:
        remedy = "Use --device cpu, or start Ray where there is one."
        raise InputError("device", "cuda, and no GPU among Ray's machines", "at least one", remedy)
    if device != "cpu" and gpus:
        return _on_gpus(machines, workers or gpus, gpus)
    return _on_processors(machines, workers)


def _on_gpus(machines: Sequence[Machine], workers: int, gpus: int) -> Plan:
    each = math.ceil(workers / gpus)  # workers of a GPU
    share = 1.0 if each == 1 else _floor(1 / each)
    # The processors beside a GPU start its kernels: one for a worker where there are so many.
    cpus = min([1.0, *(machine.cpus / (machine.gpus * each) for machine in machines if machine.gpus)])
    # One on every GPU before a second on any, and machines in turn.
    devices = [
        Place(at, gpu)
        for gpu in range(max(machine.gpus for machine in machines))
        for at, machine in enumerate(machines)
        if gpu < machine.gpus
    ]
    return Plan("cuda", _floor(cpus), share, tuple(devices[i % gpus] for i in range(workers)))


def _on_processors(machines: Sequence[Machine], workers: int | None) -> Plan:
    able = [at for at, machine in enumerate(machines) if machine.cpus > 0]
    if not able:
        raise InputError("device", "no machine with a processor", "at least one", "Look at `ray status`.")
    workers = workers or len(able)

    def holds(share: float) -> int:
        return sum(int(machines[at].cpus / share + 1e-9) for at in able)

    # The largest share of which there are enough is some machine's processors divided by a whole number.
    shares = {_whole(machines[at].cpus / count) for at in able for count in range(1, workers + 1)} - {0.0}
    share = max((share for share in shares if holds(share) >= workers), default=0.0)
    if not share:
        raise InputError("workers", workers, f"at most {holds(1 / _PARTS)}", "Start fewer.")
    rooms = [(count, at) for at in able for count in range(int(machines[at].cpus / share + 1e-9))]
    return Plan("cpu", share, 0.0, tuple(Place(at, None) for _, at in sorted(rooms)[:workers]))


def _whole(share: float) -> float:
    """As Ray takes it: above 1 whole, below it in ten-thousandths."""
    return float(int(share + 1e-9)) if share >= 1 else _floor(share)


def _floor(share: float) -> float:
    return math.floor(share * _PARTS + 1e-6) / _PARTS
