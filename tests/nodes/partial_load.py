"""Run by test_partial_load.py inside a real ComfyUI's own modules: the components, whole and in part.

Usage: python partial_load.py <ComfyUI folder> <checkpoint> [options for ComfyUI]. Prints a JSON object. With --cpu the
device that computes is a stand-in, so that what the host keeps off it is elsewhere; without, it is the host's own.
"""

import gc
import json
import logging
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMFYUI, CHECKPOINT, *OPTIONS = sys.argv[1:]
sys.path.insert(0, str(Path(__file__).parent))
import host_modules  # noqa: E402

host_modules.enter(COMFYUI, OPTIONS)

import comfy.ldm.modules.attention as attention  # noqa: E402
import comfy.model_management as management  # noqa: E402
import torch  # noqa: E402
from stand_in_card import CARD, OnCard, stand_in_card  # noqa: E402

if "--cpu" in OPTIONS:
    ROOM = 2**40
    card = stand_in_card()
    card.__enter__()
    management.get_torch_device = management.vae_device = lambda *_: CARD
    management.get_free_memory = lambda *_, torch_free_too=False, **__: (ROOM, ROOM) if torch_free_too else ROOM
    management.soft_empty_cache = lambda *_, **__: None
    attention.optimized_attention = attention.attention_pytorch  # as the host chooses on a card

host_modules.load_pack()
managers = host_modules.of_pack("nodes.host.component_manager")
casting = host_modules.of_pack("nodes.host.casting")
engine = host_modules.of_pack("llada_core.engine")
options = host_modules.of_pack("llada_core.options")


def work(model) -> list[torch.Tensor]:
    """Every component's result once: encode, draw, decode both ways."""
    image = torch.linspace(0, 1, 64 * 96 * 3).view(1, 64, 96, 3)
    encoded = model.encode(image, pixels=64 * 96)
    drawn = model.generate("a fox", references=encoded, guidance=options.Guidance(4.0, 1.5))
    turbo = model.decode(drawn.tokens, options.Decoding(True, 2, 1))[0]
    normal = model.decode(drawn.tokens, options.Decoding(False, 3, 1))[0]
    return [encoded.grids[0].float(), drawn.tokens.grids[0].float(), turbo, normal]


def away(patcher) -> list[torch.nn.Module]:
    """Layers whose weights the host keeps off the device."""
    return [m for m in patcher.model.modules() if getattr(m, "comfy_cast_weights", False)]


manager = managers.HostComponentManager("fp32")
model = engine.LLaDAUni(Path(CHECKPOINT), manager)
whole = work(model)
there = [casting.fully_resident(p.model, p.load_device) for p in manager.patchers()]
patchers = {name: part.patcher for name, part in manager._parts.items()}
report = {"devices": sorted({str(d) for p in patchers.values() for d in (p.load_device, p.offload_device)})}
report |= {"parts": sorted(patchers), "loaded": len(management.current_loaded_models), "there when whole": there}


@contextmanager
def free_bytes(count: int) -> Iterator[None]:
    """The host finds so many bytes free on the card."""
    known, management.get_free_memory = management.get_free_memory, lambda *_, **__: count
    try:
        yield
    finally:
        management.get_free_memory = known


def fits(manager, component, room: int, working: int) -> bool:
    """Whether the backbone and working memory could be on a card with so much room, most of it taken by our parts."""
    taken = sum(patcher.loaded_size() for patcher in manager.patchers())
    with free_bytes(room + management.extra_reserved_memory() + managers.HEADROOM - taken):
        return manager.could_fit("backbone", component, lambda dtype: working)


backbone = model.components["backbone"]
size = backbone.bytes(torch.float32)
report["fits beside the weights"] = [fits(manager, backbone, size + 1000, working) for working in (1000, 1001)]
report["fits where they do not"] = [fits(manager, backbone, size - 2, size // 2 - 1 + more) for more in (0, 1)]

let_go: list[str] = []
manager._parts["backbone"].before_moving.append(lambda: let_go.append("graphs"))
report["let go of"] = []
for spare in (0, -1):
    with free_bytes(500 + management.extra_reserved_memory() + spare):
        manager._make_room(patchers["decoder"], 500)
    report["let go of"].append(list(let_go))

management.unload_all_models()
report["loaded after unloading"] = len(management.current_loaded_models)


def places(patchers) -> list[int]:
    """Where the large weights lie in main memory."""
    layers = [layer for patcher in patchers for layer in casting.castable_layers(patcher.model)]
    return [layer.weight.data_ptr() for layer in layers]


before = places(patchers.values())
management.load_models_gpu(list(patchers.values()))
report["moved to the card"] = places(patchers.values()) != before
management.unload_all_models()
report["back in the same memory"] = places(patchers.values()) == before

for patcher in patchers.values():
    patcher.detach()
    patcher.partially_load(patcher.load_device, extra_memory=patcher.model_size() // 3)
report["away"] = {part: len(away(patcher)) for part, patcher in patchers.items()}
# A host may keep no more of the embedder away than its table, which is looked up where it lies.
report["only a table away"] = [
    name for name, p in patchers.items() if all(isinstance(module, casting.CastEmbedding) for module in away(p))
]
report["said to be there"] = [name for name, p in patchers.items() if casting.fully_resident(p.model, p.load_device)]
report["away that cannot be brought"] = sum(
    not isinstance(m, tuple(casting._CASTABLE_CLASSES.values())) for p in patchers.values() for m in away(p)
)
# The host must not load the rest while the parts work.
loads = management.load_models_gpu
management.load_models_gpu = lambda *arguments, **named: None
said: list[str] = []
listener = logging.Handler()
listener.emit = lambda record: said.append(record.getMessage())
watched = logging.getLogger(f"{host_modules.PACK}.nodes.host.component_manager")
watched.setLevel(logging.INFO)
watched.addHandler(listener)
partial = work(model)
report["said in part"] = list(said)
report["equal"] = [torch.equal(a, b) for a, b in zip(whole, partial, strict=True)]

table = casting.make_castable(torch.nn.Embedding(50, 8, dtype=torch.float32))
table.comfy_cast_weights = True  # as the host marks a layer that it keeps off the card
tables = torch.nn.Sequential(table, torch.nn.Linear(8, 8).to(CARD))
report["resident but for embeddings"] = casting.fully_resident(tables, CARD)
table.weight_function.append(lambda weight: weight)
report["resident with patched embeddings"] = casting.fully_resident(tables, CARD)
table.weight_function.clear()
if "--cpu" in OPTIONS:
    ids = torch.tensor([3, 1, 4]).to(CARD)
    OnCard.arrived = 0
    table(ids)
    report["embedding rows shipped"] = OnCard.arrived / table.weight[0].nbytes

# Layers of 4 bits: codes and scales that are away are those that are there.
quantized = engine.LLaDAUni(Path(CHECKPOINT), managers.HostComponentManager("fp32", "4-bit"))
load_models_gpu = management.load_models_gpu
management.load_models_gpu = loads
there = work(quantized)
management.unload_all_models()
for patcher in quantized.manager.patchers():
    patcher.partially_load(patcher.load_device, extra_memory=patcher.model_size() // 20)
management.load_models_gpu = load_models_gpu
banks = [m for p in quantized.manager.patchers() for m in away(p) if isinstance(m, casting.CastExpertBank)]
report["quantized banks away"] = sum(bank.form.name == "int4" for bank in banks)
report["equal in 4 bits"] = [torch.equal(a, b) for a, b in zip(there, work(quantized), strict=True)]
report["4 bits are not all"] = not torch.equal(there[2], whole[2])
del quantized, banks

alive = [weakref.ref(patcher.model) for patcher in patchers.values()]
del model, manager, patchers, patcher, table, tables
management.current_loaded_models.clear()
gc.collect()
report["alive after the model is dropped"] = sum(ref() is not None for ref in alive)
print(json.dumps(report))
