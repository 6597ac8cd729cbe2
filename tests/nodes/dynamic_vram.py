"""Run by test_dynamic_vram.py inside a real ComfyUI's own modules on a GPU, with its DynamicVRAM switched on.

Usage: python dynamic_vram.py <ComfyUI folder> <checkpoint>. Prints a JSON object.
"""

import gc
import json
import logging
import sys
from pathlib import Path

COMFYUI, CHECKPOINT = sys.argv[1:]
sys.path.insert(0, str(Path(__file__).parent))
import host_modules  # noqa: E402

host_modules.enter(COMFYUI, [])
import comfy_aimdo.control  # noqa: E402

comfy_aimdo.control.init()
import comfy.memory_management as memory  # noqa: E402
import comfy.model_management as management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.model_prefetch as prefetch  # noqa: E402
import torch  # noqa: E402

# As main.py does.
if not comfy_aimdo.control.init_devices([management.get_torch_device().index or 0]):
    raise RuntimeError("comfy-aimdo does not run on this device")
comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
memory.aimdo_enabled = True

host_modules.load_pack()
managers = host_modules.of_pack("nodes.host.component_manager")
casting = host_modules.of_pack("nodes.host.casting")
engine = host_modules.of_pack("llada_core.engine")
options = host_modules.of_pack("llada_core.options")

graphs = host_modules.of_pack("llada_core.backbone.cuda_graphs")
captured = []
capture = graphs.CUDAGraphRunner._capture
graphs.CUDAGraphRunner._capture = lambda self, fixed: captured.append(id(fixed)) or capture(self, fixed)

said: list[str] = []
listener = logging.Handler()
listener.emit = lambda record: said.append(record.getMessage())
logging.getLogger(host_modules.PACK).setLevel(logging.INFO)
logging.getLogger(host_modules.PACK).addHandler(listener)


def end_of_node() -> None:
    """What the host does after each node (execution.py)."""
    management.reset_cast_buffers()
    prefetch.cleanup_prefetch_queues()
    comfy_aimdo.model_vbar.vbars_reset_watermark_limits()


def work(model) -> list[torch.Tensor]:
    """Every component's result once, a node each."""
    image = torch.linspace(0, 1, 64 * 96 * 3).view(1, 64, 96, 3)
    encoded = model.encode(image, pixels=64 * 96)
    end_of_node()
    drawn = model.generate("a fox", references=encoded, guidance=options.Guidance(4.0, 1.5))
    end_of_node()
    turbo = model.decode(drawn.tokens, options.Decoding(True, 2, 1))[0]
    end_of_node()
    return [encoded.grids[0].float(), drawn.tokens.grids[0].float(), turbo]


def pinned(patchers) -> int:
    """Pages of the parts that are pinned."""
    return sum(page & 2 > 0 for patcher in patchers for page in patcher._vbar_get().get_residency())


def sizes(text: str) -> list[str]:
    """What was said of where weights are."""
    return [line for line in said if text in line]


other = comfy.model_patcher.CoreModelPatcher(
    torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)), management.get_torch_device(), torch.device("cpu")
)
management.load_models_gpu([other])
plain = engine.LLaDAUni(Path(CHECKPOINT), engine.OneDevice(management.get_torch_device(), torch.float32))
expected = work(plain)
del plain
captured.clear()

manager = managers.HostComponentManager("fp32")
model = engine.LLaDAUni(Path(CHECKPOINT), manager)
whole = work(model)
patchers = manager.patchers()
report = {"dynamic": [patcher.is_dynamic() for patcher in patchers]}
report["as on one device"] = [torch.equal(a, b) for a, b in zip(expected, whole, strict=True)]
report["graphs"] = len(captured)
report["pinned after the nodes"] = pinned(patchers)
report["in the host's queues after the nodes"] = len(prefetch.PREFETCH_QUEUES)
report["another model stays loaded"] = other in management.loaded_models()
brought = len(sizes("brought now"))
again = work(model)
report["brought again"] = len(sizes("brought now")) - brought
report["again"] = [torch.equal(a, b) for a, b in zip(whole, again, strict=True)]

placed = {name: manager.place(name, model.components[name], lambda dtype: 0) for name in model.components}
report["resident"] = {name: place.resident for name, place in placed.items()}
once_more = {name: manager.place(name, model.components[name], lambda dtype: 0) for name in model.components}
report["moves while placed twice"] = [place.moves - placed[name].moves for name, place in once_more.items()]
last = manager._parts[list(model.components)[-1]]
report["held while it works"] = pinned([last.patcher]) > 0
manager.place("backbone", model.components["backbone"], lambda dtype: 0)
report["held once another is placed"] = pinned([last.patcher])

# Room for half of each part: the rest is brought when it is used.
for part in manager._parts.values():
    part.hold.take = lambda patcher, room, beside, take=part.hold.take: take(patcher, patcher.model_size() * 2 // 3)
said.clear()
captured.clear()
partial = work(model)
report["graphs in part"] = len(captured)
report["in part"] = [torch.equal(a, b) for a, b in zip(whole, partial, strict=True)]
report["not resident in part"] = not manager.place("backbone", model.components["backbone"], lambda dtype: 0).resident
end_of_node()
report["pinned in part"] = pinned(patchers)

management.unload_all_models()
unloaded = work(model)
report["after unloading"] = [torch.equal(a, b) for a, b in zip(whole, unloaded, strict=True)]

quantized = engine.LLaDAUni(Path(CHECKPOINT), managers.HostComponentManager("fp32", "4-bit"))
alone = engine.OneDevice(management.get_torch_device(), torch.float32, "4-bit")
pair = zip(work(quantized), work(engine.LLaDAUni(Path(CHECKPOINT), alone)), strict=True)
report["4 bits as on one device"] = [torch.equal(a, b) for a, b in pair]
del quantized, alone

del model, manager, patchers, placed, once_more, last, part
gc.collect()
report["pinned memory after the model is dropped"] = len(management.PINNED_MEMORY)
print(json.dumps(report))
