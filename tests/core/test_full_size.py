"""The released sizes on the meta device: every key and shape that docs/model.md, Files lists, and no memory."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llada_core.backbone.config import BackboneConfig
from llada_core.backbone.keys import open_backbone
from llada_core.checkpoint.weights import Entry
from llada_core.errors import CheckpointError
from llada_core.sampling.working_bytes import working_bytes

RELEASED = {
    "vocab_size": 173_568,
    "image_token_offset": 157_184,
    "hidden_size": 2048,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "partial_rotary_factor": 0.5,
    "rope_theta": 600_000,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 16_384,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "moe_intermediate_size": 512,
    "intermediate_size": 5120,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
CONFIG = BackboneConfig.from_dict(RELEASED)


def mlp_shapes(stem: str, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{stem}.gate_proj.weight": (inner, 2048),
        f"{stem}.up_proj.weight": (inner, 2048),
        f"{stem}.down_proj.weight": (2048, inner),
    }


def released_shapes(stacked: bool) -> dict[str, tuple[int, ...]]:
    """Keys of the bf16 release, or of the form with stacked expert banks, and their shapes by section 3's numbers."""
    shapes = {
        "model.word_embeddings.weight": (173_568, 2048),
        "model.norm.weight": (2048,),
        "lm_head.weight": (173_568, 2048),
    }
    for n in range(20):
        layer = f"model.layers.{n}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (2048,),
            f"{layer}.post_attention_layernorm.weight": (2048,),
            f"{layer}.attention.query_key_value.weight": (3072, 2048),  # (16 + 2 x 4) heads of 128
            f"{layer}.attention.dense.weight": (2048, 2048),
            f"{layer}.attention.query_layernorm.weight": (128,),
            f"{layer}.attention.key_layernorm.weight": (128,),
        }
        if n == 0:
            shapes |= mlp_shapes(f"{layer}.mlp", 5120)
            continue
        shapes |= {f"{layer}.mlp.gate.weight": (256, 2048), f"{layer}.mlp.gate.expert_bias": (256,)}
        shapes |= mlp_shapes(f"{layer}.mlp.shared_experts", 512)
        if stacked:
            for kind in ("gate_proj", "up_proj", "down_proj"):
                shape = (256, 2048, 512) if kind == "down_proj" else (256, 512, 2048)
                shapes[f"{layer}.mlp.experts.{kind}"] = shape
        else:
            for expert in range(256):
                shapes |= mlp_shapes(f"{layer}.mlp.experts.{expert}", 512)
    return shapes


def source_of(shapes: dict[str, tuple[int, ...]]):
    """Headers without files, as `TensorFiles` would have read them."""
    entries = {key: Entry(Path("model.safetensors"), shape, "BF16") for key, shape in shapes.items()}
    return SimpleNamespace(label="backbone", entries=entries, metadata={})


@pytest.mark.parametrize("stacked", [False, True], ids=["per expert", "stacked"])
def test_every_released_tensor_has_one_place_and_every_place_is_filled(stacked):
    shapes = released_shapes(stacked)
    component = open_backbone(source_of(shapes), CONFIG)
    assert component.slots.keys() == shapes.keys()
    parameters = dict(component.module.named_parameters())
    # Each tensor's elements, numbered by (parameter, first row): none is written twice and none is left out.
    claimed: dict[str, set] = {name: set() for name in parameters}
    for key, slot in component.slots.items():
        expert, rows = slot.index or (slice(None), slice(None))
        place = (expert if isinstance(expert, int) else "all", rows.start or 0)
        assert place not in claimed[slot.name], key
        claimed[slot.name].add(place)
    for name, places in claimed.items():
        halves = 2 if name.endswith("gate_up.weight") else 1
        experts = 256 if ".experts." in name and not stacked else 1
        assert len(places) == halves * experts, name
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == sum(p.numel() for p in parameters.values())


def test_size_of_the_release():
    component = open_backbone(source_of(released_shapes(stacked=True)), CONFIG)
    total = sum(parameter.numel() for parameter in component.module.parameters())
    assert total == pytest.approx(16e9, rel=0.03)
    assert component.bytes(torch.bfloat16) == pytest.approx(32e9, rel=0.03)
    assert component.dtype == torch.bfloat16
    assert all(tensor.is_meta for tensor in component.module.state_dict().values())


def test_working_memory_of_a_picture_of_1024_pixels():
    """Far below the weights, and more than its two known parts: both rows' keys and values, and their logits."""
    estimate = working_bytes(CONFIG, branches=2, length=1150, dtype=torch.bfloat16)
    cache = 2 * 20 * 2 * 4 * 128 * 1150 * 2
    logits = 2 * 32 * 173_568 * 4
    assert cache + logits < estimate < 1e9


@pytest.mark.parametrize(
    ("key", "shape"),
    [("model.layers.19.mlp.experts.255.down_proj.weight", (512, 2048)), ("lm_head.weight", (157_184, 2048))],
)
def test_another_shape_is_refused(key, shape):
    shapes = released_shapes(stacked=False)
    assert key in shapes
    with pytest.raises(CheckpointError, match=rf"{key} of shape \[{shape[0]}, {shape[1]}\]"):
        open_backbone(source_of(shapes | {key: shape}), CONFIG)
