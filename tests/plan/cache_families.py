"""Configurations whose caches differ in kind, of few blocks, where there is one of published sizes."""

import os
from copy import deepcopy
from typing import Any

from allocator.model.architectures import architecture_rules, known_architectures
from allocator.model.attention_layers import AttentionLayer, attention_layers
from tests.configs import config_of

__all__ = ["FAMILIES", "attention_of"]


def _cut(config: dict[str, Any], blocks: int) -> dict[str, Any]:
    """`config` with its first `blocks` blocks."""
    cut = deepcopy(config)
    for part in (cut, cut.get("text_config", {})):
        if "num_hidden_layers" in part:
            part["num_hidden_layers"] = blocks
        for listed in ("layer_types", "hybrid_override_pattern"):
            if listed in part:
                part[listed] = part[listed][:blocks]
        if "full_attn_idxs" in part:
            part["full_attn_idxs"] = [i for i in part["full_attn_idxs"] if i < blocks]
    return cut


_PUBLISHED = {
    "grouped": ("qwen3-32b", 4),
    "sliding windows everywhere": ("phi-3-mini-4k", 4),
    "windows of one layer in two": ("gpt-oss-20b", 6),
    "windows of three layers in four": ("olmo-3-32b", 12),
    "windows of five layers in six": ("gemma-3-27b", 14),
    "latent": ("deepseek-v2-lite", 4),
    "linear attention": ("qwen3.5-27b", 12),
    "linear attention and experts": ("qwen3-next-80b-a3b", 8),
    "Mamba 2 and blocks that keep nothing": ("nemotron-h-8b", 14),
    "short convolutions": ("lfm2-1.2b", 9),
}
_WHOLE = os.environ.get("GAMMA_FAMILIES") == "all"

_HYBRID_ATTENTION = ["sliding_attention"] * 3 + ["full_attention"]
_COMMON = {
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 1024,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
_OWN: dict[str, dict[str, Any]] = {
    "chunked windows": {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        **_COMMON,
        "intermediate_size_mlp": 1024,
        "num_hidden_layers": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 8192,
        "head_dim": 128,
        "layer_types": (["chunked_attention"] * 3 + ["full_attention"]) * 2,
        "no_rope_layers": [1, 1, 1, 0] * 2,
    },
    "Mamba 2": {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        **_COMMON,
        "num_hidden_layers": 10,
        "layer_types": ["mamba"] * 5 + ["attention"] + ["mamba"] * 4,
        "mamba_n_heads": 64,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 1024,
        "position_embedding_type": "nope",
    },
    "caches of other layers": {
        "architectures": ["Gemma3nForCausalLM"],
        "model_type": "gemma3n_text",
        **_COMMON,
        "num_hidden_layers": 15,
        "intermediate_size": [1024] * 15,
        "activation_sparsity_pattern": [0.0] * 15,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 3,
        "num_kv_shared_layers": 5,
        "sliding_window": 512,
        "head_dim": 256,
        "num_key_value_heads": 2,
        "vocab_size_per_layer_input": 1024,
    },
    "windows beside fewer, larger heads": {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        **_COMMON,
        "num_hidden_layers": 12,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
        "sliding_window": 1024,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": 4,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 1024,
    },
    "windows with heads of their own": {
        "architectures": ["MiMoV2FlashForCausalLM"],
        "model_type": "mimo_v2_flash",
        **_COMMON,
        "num_hidden_layers": 8,
        "layer_types": _HYBRID_ATTENTION * 2,
        "hybrid_layer_pattern": [1, 1, 1, 0] * 2,
        "sliding_window": 128,
        "sliding_window_size": 128,
        "head_dim": 192,
        "v_head_dim": 128,
        "swa_head_dim": 192,
        "swa_v_head_dim": 128,
        "swa_num_attention_heads": 16,
        "swa_num_key_value_heads": 4,
        "moe_layer_freq": [0] * 8,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 512,
        "layernorm_epsilon": 1e-5,
        "attention_bias": False,
    },
}
FAMILIES: dict[str, dict[str, Any]] = {
    **{
        kind: config_of(name) if _WHOLE else _cut(config_of(name), blocks)
        for kind, (name, blocks) in _PUBLISHED.items()
    },
    **_OWN,
}
"""What a family keeps -> its config.json. With GAMMA_FAMILIES=all the published ones have all their blocks."""


def attention_of(config: dict[str, Any]) -> tuple[AttentionLayer, ...]:
    """The layers of `config`; of an architecture without rules by those of Gemma 3, whose layers alternate too."""
    (name,) = config["architectures"]
    rules = architecture_rules(name if name in known_architectures() else "Gemma3ForCausalLM")
    language = rules.language(config)
    return attention_layers(name, rules, language, rules.blocks(language))
