"""The backbone's configuration, every value from the checkpoint's config.json (docs/model.md, Backbone)."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint.weights import need
from ..errors import CheckpointError


@dataclass(frozen=True)
class BackboneConfig:
    """Fields of config.json by their own names; see docs/model.md, Backbone for the released values."""

    vocab_size: int
    image_token_offset: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    rope_theta: float
    max_position_embeddings: int
    num_shared_experts: int = 1
    first_k_dense_replace: int = 1
    partial_rotary_factor: float = 0.5
    rms_norm_eps: float = 1e-6
    routed_scaling_factor: float = 2.5

    @classmethod
    def from_dict(cls, config: Mapping) -> "BackboneConfig":
        """Read the fields. Raises CheckpointError where one is absent or says what this engine does not compute."""
        fields = cls.__dataclass_fields__
        required = [name for name, field in fields.items() if field.default is field.default_factory]
        need("backbone", config, *required)
        for name, known in _FIXED.items():
            if config.get(name, known) != known:
                found = f"{name} = {config[name]!r}"
                raise CheckpointError("backbone: config.json", found, repr(known), "This is another architecture.")
        result = cls(**{name: config[name] for name in fields if config.get(name) is not None})
        result._check()
        return result

    def _check(self):
        for name, field in self.__dataclass_fields__.items():
            value, whole = getattr(self, name), field.type is int
            least = 1 if whole and name != "first_k_dense_replace" else 0
            kinds = (int,) if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < float("inf"):
                expected = f"a {'whole ' if whole else ''}number from {least} up"
                found = f"{name} = {value!r}"
                raise CheckpointError("backbone: config.json", found, expected, "Download config.json again.")
        rules = {
            "0 < image_token_offset < vocab_size": 0 < self.image_token_offset < self.vocab_size,
            "num_attention_heads a multiple of num_key_value_heads": self.num_attention_heads % self.num_key_value_heads
            == 0,
            "num_experts below 2 ** 15": self.num_experts < 2**15,  # 16 bits number them
            "num_experts a multiple of n_group": self.num_experts % self.n_group == 0,
            "topk_group from 1 to n_group": 1 <= self.topk_group <= self.n_group,
            "num_experts_per_tok at most the experts of the chosen groups": self.num_experts_per_tok
            <= self.num_experts // self.n_group * self.topk_group,
            "an even rotary dimension up to head_dim": self.partial_rotary_factor <= 1
            and self.rotary_dim > 0
            and self.rotary_dim % 2 == 0,
        }
        for rule, holds in rules.items():
            if not holds:
                raise CheckpointError("backbone: config.json", "values that break it", rule, "Download it again.")

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that RoPE turns."""
        return int(self.head_dim * self.partial_rotary_factor)


# Fields that this architecture fixes; a release that says otherwise computes something else.
_FIXED = {
    "hidden_act": "silu",
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "use_bias": False,
    "moe_router_enable_expert_bias": True,
    "norm_topk_prob": True,
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "rope_scaling": None,
}
