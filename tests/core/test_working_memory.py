"""Sizes of the released decoder, VAE and vision tower, and their working memory, on the meta device."""

import copy
import subprocess
import sys
import weakref
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llada_core.decoder.decode import (
    AXES_LENS,
    decoder_working_bytes,
    vae_dtype,
    vae_working_bytes,
)
from llada_core.decoder.flow import guide
from llada_core.vision.siglip_vq import build, encode_working_bytes, nearest_codes

CPU = torch.device("cpu")
WIDTH = 48  # of the golden checkpoint's features
RELEASED = {
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
FLUX_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


# Memory


@pytest.fixture(scope="module")
def released():
    """The released decoder with two of its layers (a peak does not depend on their number), without weights."""
    from llada_core.decoder.transformer import SemanticDecoder

    with torch.device("meta"):
        return SemanticDecoder(**RELEASED | {"n_layers": 2, "cap_feat_dim": 4096, "axes_lens": list(AXES_LENS)})


@pytest.fixture(scope="module")
def released_vae():
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL(**FLUX_VAE)


def test_released_parts_take_the_memory_that_the_documents_say(released_vae):
    from llada_core.decoder.transformer import SemanticDecoder

    with torch.device("meta"):
        whole = SemanticDecoder(**RELEASED | {"cap_feat_dim": 4096, "axes_lens": list(AXES_LENS)})
    assert 2 * sum(p.numel() for p in whole.parameters()) == pytest.approx(12.3e9, rel=0.01)
    assert 2 * sum(p.numel() for p in released_vae.parameters()) == pytest.approx(168e6, rel=0.01)


class Peak(TorchDispatchMode):
    """The most bytes alive at once of what is made while this is active; the module's own weights do not count."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.known = {p.untyped_storage()._cdata for p in module.parameters()}
        self.alive = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.bytes = max(self.bytes, self.alive)
        return out

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


@pytest.fixture
def fused_attention(monkeypatch):
    """On the meta device attention would be measured unfused."""
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda query, *_, **__: torch.empty_like(query)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("h", "w"), [(8, 8), (32, 32), (17, 45)])
@pytest.mark.usefixtures("fused_attention")
def test_decoder_working_bytes_bound_the_peak_closely(released, h, w, dtype):
    model = copy.deepcopy(released).to(dtype)
    with torch.no_grad(), Peak(model) as peak:
        features = torch.empty(4 * h * w, 4096, dtype=dtype, device="meta")
        conditionings = [model.condition(f, (4 * h, 4 * w)) for f in (features, torch.zeros_like(features))]
        del features
        x = torch.empty(1, 16, 1, 4 * h, 4 * w, dtype=torch.float64, device="meta")
        x = x + guide(*model.velocities(x, 0.5, conditionings), 1.0)
    stated = decoder_working_bytes(h, w, dtype, released.config)
    assert peak.bytes <= stated
    if h * w > 256:
        assert stated < 1.15 * peak.bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("h", "w"), [(8, 8), (32, 32), (17, 45)])
@pytest.mark.usefixtures("fused_attention")
def test_vae_working_bytes_leave_as_much_again_for_convolutions(released_vae, h, w, dtype):
    model = copy.deepcopy(released_vae).to(vae_dtype(dtype))
    with torch.no_grad(), Peak(model) as peak:
        model.decode(torch.empty(1, 16, 4 * h, 4 * w, dtype=vae_dtype(dtype), device="meta"))
    stated = vae_working_bytes(h, w, dtype, released_vae.config)
    assert 1.9 * peak.bytes < stated
    if h * w > 256:
        assert stated < 2.2 * peak.bytes


@pytest.mark.skipif(
    Version(version("transformers")) < Version("5.12"), reason="older ones read lengths back, which needs real tensors"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("h", "w"), [(8, 8), (32, 32), (50, 50), (40, 100)])
@pytest.mark.usefixtures("fused_attention")
def test_encode_working_bytes_bound_the_peak(h, w, dtype):
    vision = {"depth": 2, "hidden_size": 1536, "image_size": 2048, "in_channels": 3, "intermediate_size": 6144}
    vq = {"embed_dim": 2048, "latent_channels": 1536, "num_embeddings": 16384}
    vision |= {"num_heads": 16, "patch_size": 16}
    model = build({"vision_config": vision, "vq_config": vq}).to(dtype)
    codebook = model.vqmodel.quantize.embedding.weight
    with torch.no_grad(), Peak(model) as tower:
        model._features(torch.empty(h * w, 3, 16, 16, dtype=dtype, device="meta"), h, w)
    with torch.no_grad(), Peak(model) as search:
        nearest_codes(torch.empty(h * w, 2048, dtype=dtype, device="meta"), codebook)
    peak = max(tower.bytes, search.bytes)
    assert search.bytes < 160e6  # 2,500 tokens against 16,384 codes at once would be more
    copies = 16384 * 1536 * (4 + dtype.itemsize)  # of the positions, where the host keeps them elsewhere
    assert peak <= encode_working_bytes(h * w * 16**2, dtype, model.config) < 1.6 * peak + copies


def test_importing_the_engines_ends_does_not_import_the_libraries():
    code = (
        "import sys, llada_core.decoder.decode, llada_core.decoder.conditioning, llada_core.vision.siglip_vq\n"
        "print([name for name in ('diffusers', 'transformers') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
