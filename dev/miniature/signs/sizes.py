"""How large the parts are that learn this world, and how long each trains."""

from math import pi

from .. import sizes
from ..sizes import Schedule, Sizes

_CODES = 2_560  # 2,480 looks of a token, and some to spare
_PIXELS = 256  # each way, of a square picture as it is seen

_BACKBONE = sizes.SHAPES.backbone | {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rope_theta": 2000.0,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "n_group": 8,
    "topk_group": 4,
    "moe_intermediate_size": 80,
}
SIGNS = Sizes(
    codes=_CODES,
    merges=768,
    dimensions=64,
    features=96,
    free=2_000,
    vision=sizes.SHAPES.vision | {"hidden_size": 160, "intermediate_size": 480, "num_heads": 5, "image_size": _PIXELS},
    vq={"num_embeddings": _CODES, "embed_dim": 48, "latent_channels": 160, "in_channels": 3},
    preprocessor=sizes.SHAPES.preprocessor
    | {
        # With these, 512 x 512 and 448 x 512 are seen at half their size, whatever it is for.
        "pixel_budgets": {
            "understand_min": 192 * 256,
            "understand_max": _PIXELS**2,
            "several_max": _PIXELS**2,
            "edit": _PIXELS**2,
        }
    },
    vae=sizes.SHAPES.vae | {"sample_size": 512},
    decoder=sizes.SHAPES.decoder
    | {
        "dim": 192,
        "n_heads": 6,
        "n_kv_heads": 6,
        # A turn of the time axis comes round once every row of 32 features, as one of the columns' axis does: which
        # column a feature belongs to, it can tell by its phase.
        "rope_theta": (2 * pi / 32) ** -4,
        "axes_lens": [1536, 512, 512],
    },
    backbone=_BACKBONE,
    length=1280,
    per_row=2,
    pictures=4,
    object_weight=3.0,
    schedules={
        "cpu": {
            "vae": Schedule(12_000, 4, 1.5e-3, 0.08, 1_000),
            "vision": Schedule(4_000, 24, 1e-3, 0.1, 4_000),
            "decoder": Schedule(60_000, 2, 1e-3, 0.3, 1_000),
            "turbo": Schedule(10_000, 2, 3e-4, 0.06, 1_000),
            "backbone": Schedule(60_000, 6, 1.5e-3, 0.46),
        },
        "cuda": {
            "vae": Schedule(6_000, 48, 1.5e-3, 0.07, 6_000),
            "vision": Schedule(12_000, 128, 1e-3, 0.1, 24_000),
            "decoder": Schedule(30_000, 32, 1e-3, 0.30, 6_000),
            "turbo": Schedule(6_000, 32, 3e-4, 0.07, 6_000),
            "backbone": Schedule(60_000, 96, 1.5e-3, 0.46),
        },
    },
)
