"""Rounds in fixed shapes, replayed as CUDA graphs.

A round of a block is over a thousand short kernels, and starting them one by one takes the processor several times as
long as the GPU needs to run them. A graph starts them all at once. It holds the addresses and sizes of everything that
it touches, so a round takes a form in which those never change: ids, positions and mask in buffers of their own, keys
written to the cache by index, and a long stretch of the cache attended to with what is not to be seen masked.
"""

import logging
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import attention_kernels
from .attention_kernels import Attend
from .cache import IndexedCache, PrefixCache
from .experts import Experts, waits_for_gpu
from .model import Backbone

log = logging.getLogger(__name__)

# Keys attended to by the shortest graph; longer ones double. Masked keys cost little, capturing anew costs two rounds.
SHORTEST = 2048
# Free bytes on the card without which nothing is captured: memory that runs out in a capture cannot be made there, and
# with some allocators the program ends. A graph of the released model takes a tenth of it.
SPARE = 2**29


class GraphedForward:
    """One shape of round over buffers that stay where they are.

    Args:
        backbone: the model.
        cache: all keys and values.
        n: positions of each row that are run.
        extent: positions of the cache that are attended to, a multiple of attention_kernels.PART.
        attend: the attention kernel; for sdpa its form in parts is taken.

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
    ):
        rows, keys = cache.rows, cache.keys[0]
        self.backbone, self.extent = backbone, extent
        self._attend = attention_kernels.in_parts if attend is attention_kernels.sdpa else attend
        self._ids = torch.zeros(rows, n, dtype=torch.int64, device=keys.device)
        self._positions = torch.zeros_like(self._ids)
        self._mask = torch.zeros(rows, 1, n, extent, dtype=torch.bool, device=keys.device)
        self._context = IndexedCache(cache, n, extent)
        self._loaded: tuple[int, torch.Tensor | None] | None = None
        self.hidden = keys.new_zeros(rows, n, backbone.config.hidden_size)
        self.warmed_up = False
        self.graph: torch.cuda.CUDAGraph | None = None

    def load(self, ids: torch.Tensor, positions: torch.Tensor, begin: int, mask: torch.Tensor | None) -> None:
        """Fill the buffers; arguments as those of `CUDAGraphRunner.run`."""
        self._ids.copy_(ids)
        if self._loaded is not None and self._loaded[0] == begin and self._loaded[1] is mask:
            return  # as in most rounds of a block
        self._loaded = (begin, mask)
        end = begin + ids.shape[1]
        self._positions.copy_(positions)
        self._context.place(begin)
        self._mask[..., :end] = True if mask is None else mask
        self._mask[..., end:] = False

    def compute(self) -> None:
        """Run the loaded positions. Allocates, but reads nothing back from the device."""
        self.hidden.copy_(self.backbone(self._ids, self._positions, self._context, 0, self._mask, self._attend))

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
        capture: False runs the same computation kernel by kernel, on any device.

    Attributes:
        sizes: as above; empty as soon as a capture has failed.
    """

    def __init__(
        self,
        backbone: Backbone,
        cache: PrefixCache,
        sizes: Collection[int],
        attend: Attend = attention_kernels.sdpa,
        capture: bool = True,
    ):
        self.backbone, self.cache, self.sizes = backbone, cache, frozenset(sizes)
        self._attend, self._capture_wanted = attend, capture
        self._rounds: dict[int, GraphedForward] = {}
        self._pool: Any = None  # torch's handle, whose type has no public name

    def run(
        self, ids: torch.Tensor, positions: torch.Tensor, begin: int, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Run n positions against the cache; what is in it from `begin` to `begin` + n is written anew.

        Args:
            ids, positions: int64 [rows, n], n one of `sizes`.
            begin: index in the cache of the first of them.
            mask: bool [rows, 1, n or 1, begin + n], True where a query sees a key; None sees all up to the last.
                The same object in the next call means the same mask.

        Returns:
            Hidden states [rows, n, hidden] in a buffer that the next call of this size overwrites; None where a
            capture failed. Nothing is run in fixed shapes from then on: their kernels may be what failed.
        """
        n = ids.shape[1]
        fixed = self._fixed(n, begin + n)
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

    def _fixed(self, n: int, end: int) -> GraphedForward:
        """The round of n positions that reaches to `end`."""
        fixed = self._rounds.get(n)
        if fixed is None or fixed.extent < end:
            if fixed is not None:
                fixed.close()
            extent = min(self.cache.capacity, max(SHORTEST, 1 << (end - 1).bit_length()))
            self._rounds[n] = fixed = GraphedForward(self.backbone, self.cache, n, extent, self._attend)
        return fixed

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
        except RuntimeError as error:
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
        # Other threads of a host may use the device meanwhile. The outer context gives the stream back in any case.
        with (
            torch.cuda.device(stream.device),
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
            freeing_what_fails(),
        ):
            fixed.compute()
        fixed.graph = graph
        return graph


def capturable_sizes(
    backbone: Backbone, attend: Attend, device: torch.device, rows: int, sizes: Collection[int]
) -> Collection[int]:
    """Those of the sizes whose rounds can be captured: on a GPU of NVIDIA's, without reading anything back from it."""
    if device.type != "cuda" or torch.version.hip or attend is attention_kernels.flash:
        return []  # flash-attn's kernel takes no mask, and asking for it is asking for that kernel
    if any(parameter.device != device for parameter in backbone.parameters()):
        return []
    experts = [module for module in backbone.modules() if isinstance(module, Experts)]
    dtype = backbone.word_embeddings.weight.dtype
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
