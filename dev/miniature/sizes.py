"""How large the parts of a checkpoint are and how long each stage trains; the sizes of the first world."""

from dataclasses import dataclass
from typing import Any

SEED = 2026
BLOCK = 32  # positions of a block


@dataclass(frozen=True)
class Schedule:
    """How long one stage trains, and on how much at once.

    Attributes:
        steps: optimizer steps at most.
        batch: examples a step (the VAE: crops of 128 x 128 pixels).
        rate: AdamW's learning rate at its height.
        share: of the minutes of the whole run that this stage may take.
        pool: pictures prepared beforehand; stages with as many share them. The backbone has none.
    """

    steps: int
    batch: int
    rate: float
    share: float
    pool: int = 0


@dataclass(frozen=True)
class Sizes:
    """All that a world says about the networks that learn it.

    Attributes:
        codes: of the quantizer.
        merges: of the byte-level BPE.
        dimensions: reserved dimension tokens.
        features: width of the SigVQ features.
        free: steps of the vision tower before its codebook is laid.
        vision, vq, preprocessor, vae, decoder, backbone: the parts' configurations.
        length: positions of a row of the backbone's training; its longest sequence fits.
        per_row: examples that such a row holds, about.
        pictures: of a sequence, at most.
        object_weight: what an image token that is none of the ground's, and a token of a plan, weighs in the loss.
        schedules: for "cpu" and "cuda", of each stage.
    """

    codes: int
    merges: int
    dimensions: int
    features: int
    free: int
    vision: dict[str, Any]
    vq: dict[str, Any]
    preprocessor: dict[str, Any]
    vae: dict[str, Any]
    decoder: dict[str, Any]
    backbone: dict[str, Any]
    length: int
    per_row: int
    pictures: int
    object_weight: float
    schedules: dict[str, dict[str, Schedule]]


_CODES = 512  # of the quantizer: 40 quarters of objects in 8 colours, 8 backgrounds, and room to spare
_FEATURES = 96  # width of the SigVQ features

_VISION = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_heads": 4,
    "depth": 4,
    "patch_size": 16,
    "image_size": 128,
    "in_channels": 3,
    "hidden_act": "gelu",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "layer_norm_eps": 1e-6,
    "spatial_merge_size": 1,
}
_VQ = {"num_embeddings": _CODES, "embed_dim": 32, "latent_channels": _VISION["hidden_size"], "in_channels": 3}
_PREPROCESSOR = {
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "patch_size": 16,
    "temporal_patch_size": 1,
    "merge_size": 1,
    # 256 x 256 is seen as 128 x 128, 192 x 256 as 96 x 128, whatever it is for.
    "pixel_budgets": {"understand_min": 96 * 128, "understand_max": 128**2, "several_max": 128**2, "edit": 128**2},
}

_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "block_out_channels": [16, 16, 32, 48],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 1,  # more groups would each forget the level of a flat colour
    "act_fn": "silu",
    "mid_block_add_attention": False,  # so that crops of a picture train it as well as whole pictures
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
    "sample_size": 256,
}

_DECODER = {
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": 160,
    "n_layers": 4,
    "n_refiner_layers": 1,
    "n_heads": 5,
    "n_kv_heads": 5,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": _FEATURES,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [16, 8, 8],
    "axes_lens": [1536, 512, 512],
}

_BACKBONE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "hidden_act": "silu",
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "use_bias": False,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 1000.0,  # sequences are a few hundred long
    "partial_rotary_factor": 0.5,
    "rope_scaling": None,
    "num_experts": 8,
    "num_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.0,
    "moe_router_enable_expert_bias": True,
    "norm_topk_prob": True,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
    "tie_word_embeddings": False,
    "model_type": "llada2_moe",
}
_SCHEDULES = {
    "cpu": {
        "vae": Schedule(12_000, 4, 1.5e-3, 0.12, 2_000),
        "vision": Schedule(3_000, 48, 1e-3, 0.07, 6_000),
        "decoder": Schedule(60_000, 6, 1e-3, 0.28, 3_000),
        "turbo": Schedule(10_000, 6, 3e-4, 0.06, 3_000),
        "backbone": Schedule(60_000, 12, 1.5e-3, 0.47),
    },
    "cuda": {
        "vae": Schedule(8_000, 48, 1.5e-3, 0.12, 8_000),
        "vision": Schedule(4_000, 256, 1e-3, 0.07, 20_000),
        "decoder": Schedule(24_000, 96, 1e-3, 0.30, 20_000),
        "turbo": Schedule(5_000, 96, 3e-4, 0.07, 20_000),
        "backbone": Schedule(24_000, 384, 1.5e-3, 0.44),
    },
}

SHAPES = Sizes(
    codes=_CODES,
    merges=320,
    dimensions=64,
    features=_FEATURES,
    free=300,
    vision=_VISION,
    vq=_VQ,
    preprocessor=_PREPROCESSOR,
    vae=_VAE,
    decoder=_DECODER,
    backbone=_BACKBONE,
    length=768,
    per_row=4,
    pictures=4,
    object_weight=1.0,
    schedules=_SCHEDULES,
)
