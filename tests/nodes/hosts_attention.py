"""Run by test_hosts_attention.py inside a real ComfyUI's own modules: the decoder with each of the host's attentions.

Usage: python hosts_attention.py <ComfyUI folder>. Prints a JSON object.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import host_modules

host_modules.enter(sys.argv[1], ["--cpu"])

import comfy.ldm.modules.attention as host  # noqa: E402
import torch  # noqa: E402

host_modules.load_pack()
use_hosts_attention = host_modules.of_pack("nodes.host.attention").use_hosts_attention
SemanticDecoder = host_modules.of_pack("llada_core.decoder.transformer").SemanticDecoder

GPU, CPU = torch.device("cuda"), torch.device("cpu")  # only told to the function: all is computed on the CPU
SIZES = {"dim": 96, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [16, 16, 16]}


def decoder(attention, device) -> SemanticDecoder:
    """A random decoder in a host that was started with this attention."""
    torch.manual_seed(0)
    host.optimized_attention = attention
    made = SemanticDecoder(cap_feat_dim=20, axes_lens=[4096, 64, 64], **SIZES).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.normal_(0, 0.3)
    return use_hosts_attention(made, device)


def velocity(made: SemanticDecoder) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, features = torch.randn(1, 16, 1, 8, 12, generator=generator), torch.randn(24, 20, generator=generator)
    return made.velocity(x, 0.3, made.condition(features, (8, 12)))


plain = SemanticDecoder.attention
expected = velocity(decoder(host.attention_pytorch, GPU))
report = {"torch's is left alone": decoder(host.attention_pytorch, GPU).attention is plain}
report["a CPU keeps torch's"] = decoder(host.attention_sub_quad, CPU).attention is plain
report["distance"], report["calls"] = {}, {}
for name in ("attention_basic", "attention_split", "attention_sub_quad"):
    calls, function = [], getattr(host, name)

    def chosen(*args, function=function, calls=calls, **kwargs):
        calls.append(args[0].shape)
        return function(*args, **kwargs)

    found = velocity(decoder(chosen, GPU))
    report["distance"][name] = float((found - expected).norm() / expected.norm())
    report["calls"][name] = len(calls)
print(json.dumps(report))
