"""All that is Ray's: starting it or joining a cluster, and a dataset of batches through a pool of workers."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.data

from .devices import Machine, Plan
from .requests import Request
from .rows import Result, pack, unpack_result
from .worker import Settings, Worker

log = logging.getLogger(__name__)

STORE = 512 * 2**20  # bytes for what is on its way between processes, on a machine of our own: batches and pictures


class Stopped(RuntimeError):
    """The workers cannot go on; the text says why."""


class Attempts:
    """Counts how often each batch has been begun; an actor of its own, which outlives the workers."""

    def __init__(self) -> None:
        self._begun: dict[str, int] = {}

    def begin(self, key: str) -> int:
        """One more."""
        self._begun[key] = self._begun.get(key, 0) + 1
        return self._begun[key]

    def again(self) -> int:
        """How often one was begun that had been begun before."""
        return sum(self._begun.values()) - len(self._begun)


def _worker(settings: Settings, attempts: Any) -> type[Worker]:
    """Workers that count attempts in an actor. The class has all that one needs to start, and to start again."""

    class RayWorker(Worker):
        def __init__(self) -> None:
            super().__init__(settings, lambda key: ray.get(attempts.begin.remote(key)))

    return RayWorker


@contextmanager
def joined(address: str | None) -> Iterator[list[Machine]]:
    """Ray's machines, while the context lasts.

    Args:
        address: of a cluster, as ray.init takes it ("ray://...", "host:6379", "auto" for the one of this machine);
            None starts Ray in this machine alone, for this run.

    Raises:
        Stopped: no cluster at that address.
    """
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would send them to its makers
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=STORE,
                logging_level=logging.ERROR,
            )
        else:
            ours = Path(__file__).parents[1]
            ray.init(address=address, runtime_env={"py_modules": [str(ours)]}, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ImportError) as error:
        raise Stopped(f"Ray at {address or 'this machine'}: {error}") from error
    try:
        yield [
            Machine(node["Resources"].get("CPU", 0.0), int(node["Resources"].get("GPU", 0)))
            for node in ray.nodes()
            if node["Alive"]
        ]
    finally:
        ray.shutdown()


class Pass:
    """Batches through a pool of workers.

    Args:
        rows: a batch each.
    """

    def __init__(self, rows: list[dict[str, Any]], plan: Plan, settings: Settings):
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = False
        self._attempts = ray.remote(num_cpus=0)(Attempts).remote()
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).flat_map(
            _worker(settings, self._attempts),
            compute=ray.data.ActorPoolStrategy(size=min(plan.workers, len(rows)), max_tasks_in_flight_per_actor=1),
            num_cpus=plan.cpus,
            num_gpus=plan.gpus,
        )
        # Without prefetching: it would hold each batch of results back until the next is there.
        self._done = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))

    def take(self) -> list[dict[str, Any]] | None:
        """The next rows of results, as they come; None after the last."""
        table = next(self._done, None)
        return None if table is None else table.to_pylist()

    def again(self) -> int:
        """How often a batch was begun again, because its worker had ended."""
        return ray.get(self._attempts.again.remote())

    def close(self) -> None:
        """End it before its end. Otherwise Ray Data would go on, and start another Ray once this one is left."""
        self._done.close()


class RemotePass:
    """A Pass in an actor of the cluster: Ray Data does not run in a program at the far end of ray://."""

    def __init__(self, rows: list[dict[str, Any]], plan: Plan, settings: Settings):
        self._actor = ray.remote(num_cpus=0)(Pass).remote(rows, plan, settings)

    def take(self) -> list[dict[str, Any]] | None:
        """As Pass."""
        return ray.get(self._actor.take.remote())

    def again(self) -> int:
        """As Pass."""
        return ray.get(self._actor.again.remote())

    def close(self) -> None:
        """As Pass."""
        ray.kill(self._actor)


def run_batches(
    batches: Sequence[Sequence[Request]], plan: Plan, settings: Settings, address: str | None
) -> Iterator[Result]:
    """Results as they come, in no order; every request has exactly one.

    A worker that ends is started again and given its batch again. A batch that ends its worker twice is taken apart,
    and a request that does so by itself has that as its error.

    Args:
        batches: of requests that are alike.
        address: of the cluster that was joined; its machines may not see the requests' files.

    Raises:
        Stopped: no worker can open the checkpoint, or Ray itself fails.
    """
    waiting = {request.id: request for batch in batches for request in batch}
    yield from _one_pass(batches, plan, settings, address, waiting)
    if waiting:
        log.warning("%d requests ended their worker, or stood beside one that did; now one by one", len(waiting))
        yield from _one_pass([[request] for request in waiting.values()], plan, settings, address, waiting)
    for request in waiting.values():
        text = "its worker ended each time that it was run: killed, or out of memory, or a fault below Python"
        yield Result(request.id, request.kind, error=text)


def _one_pass(
    batches: Sequence[Sequence[Request]],
    plan: Plan,
    settings: Settings,
    address: str | None,
    waiting: dict[str, Request],
) -> Iterator[Result]:
    """Each batch once; what has a result leaves `waiting`, so that what Ray may compute anew counts once."""
    rows = []
    for number, batch in enumerate(batches):
        row, gone = pack(str(number), batch, send=address is not None)
        rows += [row] if len(gone) < len(batch) else []
        for result in gone:
            del waiting[result.id]
            yield result
    if not rows:
        return
    try:
        with closing((RemotePass if (address or "").startswith("ray://") else Pass)(rows, plan, settings)) as running:
            while (done := running.take()) is not None:
                for row in done:
                    if row["fault"]:
                        raise Stopped(row["fault"])
                    result = unpack_result(row)
                    if waiting.pop(result.id, None) is not None:
                        yield result
            again = running.again()
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise Stopped(f"Ray: {error}") from error
    if again:
        log.warning("a worker ended in the middle of a batch, and the batch was run again: %d times", again)
