"""What the config class of a family does not tell of itself, and how to ask it for the rest."""

from typing import Any

__all__ = [
    "BY_KIND", "EVERY_NTH", "FIXED", "KINDS", "MAY_BE_ZERO", "SPARSE_RULES", "default_of", "value_of",
]  # fmt: skip

KINDS: dict[str, list[str]] = {
    # Of what kinds the blocks of a published model are; made without a list, the class has others or none.
    "lfm2": ["conv", "full_attention"],
    "lfm2_moe": ["conv", "full_attention"],
    "nemotron_h": ["linear_attention", "moe", "full_attention", "mlp"],
}
BY_KIND: dict[str, dict[str, str]] = {
    # Keys of config.json that its class takes apart: what they are called in a block of full attention.
    "gemma4_text": {"global_head_dim": "head_dim", "num_global_key_value_heads": "num_key_value_heads"},
}
FIXED: dict[str, dict[str, Any]] = {
    # With what it does not have by default: experts, and blocks of both kinds with the keys of earlier ones.
    "gemma4_text": {
        "num_kv_shared_layers": 4,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "top_k_experts": 2,
    },
}
MAY_BE_ZERO = ("hidden_size_per_layer_input",)
"""Sizes of what a model does not have where they are 0."""
SPARSE_RULES: dict[str, dict[str, Any]] = {
    "all": {},
    "first_k_dense_replace": {"first_k_dense_replace": 3},
    "num_dense_layers": {"num_dense_layers": 3},
    "decoder_sparse_step": {"decoder_sparse_step": 2},
    "interleave_moe_layer_step": {"interleave_moe_layer_step": 2},
}
"""By the key that says which blocks have experts, values for which there are blocks of both sorts."""
EVERY_NTH = ("decoder_sparse_step", "interleave_moe_layer_step")


def value_of(config: Any, key: str) -> Any:
    """The value of a key; None where the config has another for each block, or none."""
    try:
        return getattr(config, key, None)
    except Exception:  # of a class of its own, which older releases do not have
        return None


def default_of(config: Any, key: str, by_kind: dict[str, str]) -> Any:
    """The value of a key in a config that was made without it: those of a kind of blocks stand with these."""
    if key in by_kind:
        return getattr(config.per_layer_config[config.layer_types.index("full_attention")], by_kind[key])
    if key in by_kind.values():
        return getattr(config.per_layer_config[config.layer_types.index("sliding_attention")], key)
    return getattr(config, key, None)
