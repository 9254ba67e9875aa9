"""What the config class of a family does not tell of itself, and how to ask it for the rest."""

from dataclasses import fields
from typing import Any

from allocator.blocks.discovery.probes import BLOCKS

__all__ = [
    "BY_KIND", "DENSE_BLOCKS", "EVERY_NTH", "FIXED", "KINDS", "MAY_BE_ZERO", "default_of", "dense_blocks",
    "sparse_rules", "value_of",
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
MAY_BE_ZERO = (
    "hidden_size_per_layer_input", "shared_intermediate_size", "shared_expert_intermediate_size", "num_shared_experts",
    "n_shared_experts", "moe_num_shared_experts",
)  # fmt: skip
"""Sizes of what a model does not have where they are 0."""
_SPARSE_RULES: dict[str, dict[str, Any]] = {
    "all": {},
    "first_k_dense_replace": {"first_k_dense_replace": 3},
    "num_dense_layers": {"num_dense_layers": 3},
    "decoder_sparse_step": {"decoder_sparse_step": 2},
    "interleave_moe_layer_step": {"interleave_moe_layer_step": 2},
}
"""By the key that says which blocks have experts, values for which there are blocks of both sorts."""
DENSE_BLOCKS = ("num_dense_layers", "moe_layer_start_index")
"""Other keys of how many blocks without experts come before those with them."""
EVERY_NTH = ("decoder_sparse_step", "interleave_moe_layer_step")


_KINDS_OF_MLP = "mlp_layer_types"


def sparse_rules(kind: Any) -> dict[str, Any]:
    """Values for the keys of a config class by which it has blocks with and without experts."""
    known = {key.name for key in fields(kind)}
    found = {key: value for rule in _SPARSE_RULES.values() for key, value in rule.items() if key in known}
    if _KINDS_OF_MLP in known and not found and set(getattr(kind(), _KINDS_OF_MLP)) == {"sparse"}:
        found[_KINDS_OF_MLP] = ["dense"] * 3 + ["sparse"] * (BLOCKS - 3)
    return found


def dense_blocks(kind: Any, found: int) -> int:
    """How many blocks are without experts where config.json does not say it: `found` for a class without a list."""
    listed = getattr(kind(), _KINDS_OF_MLP, None)
    return list(listed).index("sparse") if listed and "sparse" in listed else found


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
