"""Rounds in fixed shapes, replayed as CUDA graphs.

A round of a block is over a thousand short kernels, and starting them one by one takes the processor several times as
long as the GPU needs to run them. A graph starts them all at once. It holds the addresses and sizes of everything that
it touches, so a round takes a form in which those never change: embeddings, positions and mask in buffers of their own,
keys written to the cache by index, and a long stretch of the cache attended to with what is not to be seen masked. Ids
are looked up before the graph, so that their table, of which a round needs a few rows, may lie anywhere.
"""

import logging
import traceback
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..quantization.kernel_switch import KernelSwitch
from . import attention_kernels
from .attention_kernels import Attend
from .cache import IndexedCache, PrefixCache
from .experts import Experts, waits_for_gpu
from .model import Backbone

log = logging.getLogger(__name__)

# What follows the backbone in a round: takes the hidden states of its last positions [rows, block, hidden].
Then = Callable[[torch.Tensor], None]

# Keys attended to by the shortest graph; longer ones double. Masked keys cost little, capturing anew costs two rounds.
SHORTEST = 2048
# Free bytes on the card without which nothing is captured: memory that runs out in a capture cannot be made there, and
# with some allocators the program ends. A graph of the released model takes a tenth of it.
SPARE = 2**29
# Bytes that graphs and their caches may take between generations: so many, or a share of a large card. Sixteen guided
# pictures of the released model take nearly 3 GB.
KEPT, SHARE = 2**30, 1 / 32


class GraphedForward:
    """One shape of round over buffers that stay where they are.

    Args:
        backbone: the model.
        cache: all keys and values.
        n: positions of each row that are run.
        extent: positions of the cache that are attended to, a multiple of attention_kernels.PART.
        attend: the attention kernel; for sdpa its form in parts is taken.
        then: what else belongs to the round, over the hidden states of its last `block` positions.
        block: as above.

    Attributes:
        hidden: what the last `compute` returned, [rows, n, hidden].
        warmed_up: whether it has run where it is captured, so that libraries have set themselves up.
        graph: `compute`, captured; None before.
    """

    def __init__(
        self,
        backbone: Backbone,
        cache: PrefixCache,
        n: int,
        extent: int,
        attend: Attend = attention_kernels.sdpa,
        then: Then | None = None,
        block: int = 0,
    ):
        rows, keys = cache.rows, cache.keys[0]
        self.backbone, self._then, self._block = backbone, then, block or n
        in_parts = cast(Attend, attention_kernels.in_parts)  # which wants a mask, and here there always is one
        self._attend = in_parts if attend is attention_kernels.sdpa else attend
        self._embedded = keys.new_zeros(rows, n, backbone.config.hidden_size)
        self._positions = torch.zeros(rows, n, dtype=torch.int64, device=keys.device)
        self._mask = torch.zeros(rows, 1, n, extent, dtype=torch.bool, device=keys.device)
        self._context = IndexedCache(cache, n, extent)
        self._loaded: tuple[int | Sequence[int], torch.Tensor | None] | None = None
        self.hidden = torch.zeros_like(self._embedded)
        self.warmed_up = False
        self.graph: torch.cuda.CUDAGraph | None = None

    def load(
        self, ids: torch.Tensor, positions: torch.Tensor, begin: int | Sequence[int], mask: torch.Tensor | None
    ) -> None:
        """Fill the buffers; arguments as those of `CUDAGraphRunner.run`."""
        self._embedded.copy_(self.backbone.word_embeddings(ids))
        if self._loaded is not None and self._loaded[0] == begin and self._loaded[1] is mask:
            return  # as in most rounds of a block
        self._loaded = (begin, mask)
        end = mask.shape[-1] if mask is not None else furthest(begin) + ids.shape[1]
        self._positions.copy_(positions)
        self._context.place(begin)
        self._mask[..., :end] = True if mask is None else mask
        self._mask[..., end:] = False

    def compute(self) -> None:
        """Run the loaded positions. Allocates, but reads nothing back from the device."""
        self.hidden.copy_(
            self.backbone.run(self._embedded, self._positions, self._context, 0, self._mask, self._attend)
        )
        if self._then is not None:
            self._then(self.hidden[:, -self._block :])

    def close(self) -> None:
        """Let go of the graph and its memory."""
        if self.graph is not None:
            torch.cuda.synchronize(self.hidden.device)  # it may still be running
            self.graph.reset()
            self.graph = None


class CUDAGraphRunner:
    """Rounds of a few sizes against one cache, as graphs from the second round of a size on.

    A capture takes about as long as a round without one, so a size that comes twice loses nothing by it. Graphs hold
    the addresses of weights: nobody may move those before `close`.

    Args:
        backbone: the model.
        cache: all keys and values, its capacity a multiple of attention_kernels.PART.
        sizes: how many positions a round may run.
        attend: the attention kernel.
        then: what follows the backbone in each round; it reads and writes only tensors that stay where they are.
        block: positions that `then` takes.
        capture: False runs the same computation kernel by kernel, on any device.

    Attributes:
        sizes: as above; empty as soon as a capture has failed.
        pool_bytes: what graphs have taken of the card, the cache aside.
    """

    def __init__(
        self,
        backbone: Backbone,
        cache: PrefixCache,
        sizes: Collection[int],
        attend: Attend = attention_kernels.sdpa,
        then: Then | None = None,
        block: int = 0,
        capture: bool = True,
    ):
        self.backbone, self.cache, self.sizes = backbone, cache, frozenset(sizes)
        self.then, self.block = then, block
        self.pool_bytes = 0
        self._attend, self._capture_wanted = attend, capture
        self._rounds: dict[tuple[int, int], GraphedForward] = {}  # by n and extent
        self._pool: Any = None  # torch's handle, whose type has no public name

    @property
    def bytes(self) -> int:
        """What the cache and the graphs take."""
        return self.cache.bytes + self.pool_bytes

    def run(
        self, ids: torch.Tensor, positions: torch.Tensor, begin: int | Sequence[int], mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Run n positions against the cache; what is in it from `begin` to `begin` + n is written anew.

        Args:
            ids, positions: int64 [rows, n], n one of `sizes`.
            begin: index in the cache of the first of them, for all rows or of each.
            mask: bool [rows, 1, n or 1, end], the end that of the row that reaches furthest, True where a query sees a
                key; None, where all begin at one place, sees all up to the last. The same object in the next call means
                the same mask.

        Returns:
            Hidden states [rows, n, hidden] in a buffer that the next call of this size overwrites; None where a
            capture failed. Nothing is run in fixed shapes from then on: their kernels may be what failed.
        """
        n = ids.shape[1]
        fixed = self._fixed(n, furthest(begin) + n)
        fixed.load(ids, positions, begin, mask)
        if fixed.graph is not None:
            fixed.graph.replay()
        elif not self._capture_wanted:
            fixed.compute()
        elif not self._begin(fixed):
            self.close()
            self.sizes = frozenset()
            return None
        return fixed.hidden

    def close(self) -> None:
        """Let go of all graphs and their memory."""
        for fixed in self._rounds.values():
            fixed.close()
        self._rounds.clear()
        self.pool_bytes = 0

    def _fixed(self, n: int, end: int) -> GraphedForward:
        """The round of n positions that reaches to `end`. How far it attends depends on `end` alone, not on what ran
        before, for sums over another number of parts are rounded in another way."""
        extent = min(self.cache.capacity, max(SHORTEST, 1 << (end - 1).bit_length()))
        if (n, extent) not in self._rounds:
            self._rounds[n, extent] = GraphedForward(
                self.backbone, self.cache, n, extent, self._attend, self.then, self.block
            )
        return self._rounds[n, extent]

    def _begin(self, fixed: GraphedForward) -> bool:
        """Compute once on the way to a graph: the warm-up, or the capture and its first replay.

        False where that fails, which is logged.
        """
        try:
            if fixed.warmed_up:
                if (free := _free_bytes(fixed.hidden.device)) < SPARE:
                    raise RuntimeError(f"{free / 1e6:.0f} MB are free on the card, and {SPARE / 1e6:.0f} are wanted")
                self._capture(fixed).replay()  # some allocators take a graph's memory only now
            else:
                self._warm_up(fixed)
        except (RuntimeError, ValueError) as error:  # Triton's launcher raises the latter
            fixed.graph = None
            log.warning("rounds go on without CUDA graphs (%s: %s)", type(error).__name__, str(error))
            return False
        return True

    def _warm_up(self, fixed: GraphedForward) -> None:
        """Compute on the stream of captures. Raises RuntimeError where something would be read back."""
        stream = _capture_stream(fixed.hidden.device)
        with torch.cuda.device(stream.device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), ReadingBackRaises():
                fixed.compute()
            torch.cuda.current_stream().wait_stream(stream)
        fixed.warmed_up = True

    def _capture(self, fixed: GraphedForward) -> torch.cuda.CUDAGraph:
        """Make the graph. Raises RuntimeError, OutOfMemoryError among them, where that fails."""
        stream = _capture_stream(fixed.hidden.device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()  # rounds follow each other, so they share memory
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.memory_reserved(stream.device)
        # Other threads of a host may use the device meanwhile. The outer context gives the stream back in any case.
        with (
            torch.cuda.device(stream.device),
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
            freeing_what_fails(),
        ):
            fixed.compute()
        fixed.graph = graph
        self.pool_bytes += max(torch.cuda.memory_reserved(stream.device) - before, 0)
        return graph


class GraphStore:
    """CUDA graphs and their caches, kept from one generation to the next for as long as weights stay where they are.

    Args:
        most: bytes that may be kept between generations, by default `kept_bytes`; what was used longest ago is let go
            first.
    """

    def __init__(self, most: int | None = None):
        self._most = most
        self._kept: dict[Hashable, CUDAGraphRunner] = {}
        self._place: tuple[Backbone, int] | None = None

    @property
    def bytes(self) -> int:
        """What is kept takes."""
        return sum(runner.bytes for runner in self._kept.values())

    def follow(self, backbone: Backbone, moves: int) -> None:
        """Let go of what was made for other weights, or for these in another place."""
        if self._place is None or self._place[0] is not backbone or self._place[1] != moves:
            self.close()
        self._place = backbone, moves

    def take(self, key: Hashable) -> CUDAGraphRunner | None:
        """What was kept of these shapes; it is the caller's until it is given back."""
        return self._kept.pop(key, None)

    def has(self, key: Hashable) -> bool:
        """Whether something of these shapes is kept."""
        return key in self._kept

    def most(self, device: torch.device) -> int:
        """Bytes that may be kept."""
        return kept_bytes(device) if self._most is None else self._most

    def touch(self, key: Hashable) -> None:
        """Count what is kept of these shapes as just used: a batch like the one that ends begins with all its rows."""
        if key in self._kept:
            self._kept[key] = self._kept.pop(key)

    def give(self, key: Hashable, runner: CUDAGraphRunner) -> None:
        """Keep a runner, and let go of others where all is too much."""
        self._kept[key] = runner
        most = self.most(runner.cache.keys[0].device)
        while self.bytes > most:
            self._kept.pop(next(iter(self._kept))).close()

    def close(self) -> None:
        """Let go of everything, the weights among it."""
        for runner in self._kept.values():
            runner.close()
        self._kept.clear()
        self._place = None


def furthest(begin: int | Sequence[int]) -> int:
    """One place for all rows, or the last of those that each has."""
    return begin if isinstance(begin, int) else max(begin)


def kept_bytes(device: torch.device) -> int:
    """What may be kept on a device between generations."""
    if device.type != "cuda":
        return KEPT
    return max(KEPT, int(torch.cuda.get_device_properties(device).total_memory * SHARE))


def capturable_sizes(
    backbone: Backbone, attend: Attend, device: torch.device, rows: int, sizes: Collection[int]
) -> Collection[int]:
    """Those of the sizes whose rounds can be captured: on a GPU of NVIDIA's, without reading anything back from it.

    All weights are on it then, but for the embeddings, which are looked up where they lie.
    """
    if device.type != "cuda" or torch.version.hip or attend is attention_kernels.flash:
        return []  # flash-attn's kernel takes no mask, and asking for it is asking for that kernel
    if any(parameter.device != device for parameter in backbone.used_in_rounds()):
        return []
    for module in backbone.modules():
        kernels = getattr(module, "kernels", None)
        if isinstance(kernels, KernelSwitch):
            # Kernels are tried at their first use, which reads results back: not to be in a warm-up.
            kernels.usable(torch.empty(0, device=device))
    experts = [module for module in backbone.modules() if isinstance(module, Experts)]
    dtype = backbone.norm.weight.dtype
    kept = [n for n in sizes if not any(waits_for_gpu(module, rows * n, dtype) for module in experts)]
    if len(kept) < len(sizes):
        left = ", ".join(str(rows * n) for n in sizes if n not in kept)
        log.info("rounds of %s tokens run without CUDA graphs: no kernel here sends so many to experts at once", left)
    return kept


def _free_bytes(device: torch.device) -> int:
    """What a new pool of memory can take on the card. What torch keeps for its other pools is given back for it."""
    free = torch.cuda.mem_get_info(device)[0]
    if free < SPARE:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
    return free


def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """torch's own stream for captures: libraries keep working memory for every stream, so new ones would add up."""
    with torch.cuda.device(device):
        stream = torch.cuda.graph(torch.cuda.CUDAGraph()).capture_stream
        return stream if stream is not None and stream.device == device else torch.cuda.Stream(device)


@contextmanager
def freeing_what_fails() -> Iterator[None]:
    """An error inside leaves as it is, but for the tensors that its traceback would keep.

    What was allocated in a capture must be freed in it: afterwards cudaMallocAsync ends the whole program.
    """
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


class ReadingBackRaises(TorchDispatchMode):
    """Whatever would wait for the GPU is a RuntimeError inside, in this thread alone.

    In a capture it would be an error too, but one that costs the program torch's random numbers on that device. torch's
    own way to find it, set_sync_debug_mode, is one switch for all threads of a host.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indexing = name in ("index", "index_put", "index_put_", "_index_put_impl_")
        if indexing:
            waits = any(index.dtype in (torch.bool, torch.uint8) for index in tree_leaves(args[1]) if index is not None)
        else:
            waits = bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))
        out = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            waits = source.device.type != "cpu" and out.device.type == "cpu"
        if waits:
            raise RuntimeError(f"{func} reads back from the device")
        return out
