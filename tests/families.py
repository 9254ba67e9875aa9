"""Tiny random models of many families, in the sizes that vLLM's CPU attention takes (heads of 32 and more)."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "DENSE",
    "EXPERTS",
    "FAMILIES",
    "HYBRID",
    "LIKE_OTHERS",
    "MODEL_TYPES",
    "NOTHING_NEW",
    "NOT_NAMED",
    "NOT_SERVED",
    "NOT_TRIED",
    "SERVED_AS",
    "SERVED_WITH",
    "SIZES",
    "WRAPPERS",
    "chosen",
    "make_family",
    "make_wrapper",
]

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
_WINDOWS = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}

_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,  # vLLM's CPU build has no other
    "linear_value_head_dim": 128,
    "layer_types": ["linear_attention", "full_attention"],
}
_HEAD = {"head_dim": 32}
_LATENT = {
    "kv_lora_rank": 512,  # vLLM's CPU build has no other sum of this and the next
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1}
_ROUTED = _EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
_INDEXED = {"index_topk": 16, "index_head_dim": 64, "index_n_heads": 2, "mlp_layer_types": ["dense", "sparse"]}
_FOUR = _EXPERTS | {"num_experts": 4}

_GEMMA4 = (
    {"tie_word_embeddings": True, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0}
    | {
        "global_head_dim": 64,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    }
    | _HEAD
    | _WINDOWS
)

DENSE: dict[str, dict[str, Any]] = {
    "apertus": _HEAD,
    "arcee": {},
    "cohere": {"logit_scale": 0.25, "tie_word_embeddings": True},
    "cohere2": {"logit_scale": 0.25, "tie_word_embeddings": True} | _HEAD | _WINDOWS,
    "cwm": _HEAD | _WINDOWS,
    "ernie4_5": {"use_bias": False} | _HEAD,
    "exaone4": _HEAD | _WINDOWS,
    "gemma": {"tie_word_embeddings": True} | _HEAD,
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 32} | _HEAD | _WINDOWS,
    "gemma4_text": _GEMMA4,
    "glm": _HEAD,
    "glm4": _HEAD,
    "granite": {
        "embedding_multiplier": 6.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.1,
    },
    "granite_swa": {"attention_multiplier": 0.1, "layer_rope_theta": [1e4, 1e5]} | _WINDOWS,
    "hunyuan_v1_dense": _HEAD,
    "hyperclovax": {},
    "jais2": _HEAD,
    "minicpm3": {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32}
    | {"v_head_dim": 32, "num_key_value_heads": 4},
    "ministral3": _HEAD,
    "mistral": {"sliding_window": 24} | _HEAD,
    "nemotron": _HEAD,
    "olmo": {},
    "olmo2": {},
    "olmo3": _WINDOWS,
    "phi": {},
    "seed_oss": _HEAD,
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
    "vaultgemma": _HEAD | _WINDOWS,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "afmoe": _FOUR | {"num_dense_layers": 1} | _HEAD | _WINDOWS,
    "axk1": _ROUTED | _LATENT,
    "cohere2_moe": {"num_experts_per_tok": 2, "num_experts": 4, "logit_scale": 0.25, "tie_word_embeddings": True}
    | {"num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"], "prefix_dense_intermediate_size": 160}
    | _HEAD
    | _WINDOWS,
    "deepseek_v2": _ROUTED | _LATENT | {"q_lora_rank": None, "topk_method": "greedy"},
    "deepseek_v3": _ROUTED | _LATENT | {"topk_method": "noaux_tc"},
    "deepseek_v32": _ROUTED | _LATENT | _INDEXED,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 1}
    | {"moe_layer_start_index": 1, "moe_layer_end_index": -1, "use_bias": False},
    "exaone_moe": _FOUR | {"first_k_dense_replace": 1, "num_shared_experts": 1} | _HEAD | _WINDOWS,
    "flex_olmo": {"num_experts_per_tok": 2, "num_experts": 4},
    "gemma4_moe": _GEMMA4 | _FOUR | {"enable_moe_block": True, "top_k_experts": 2},
    "glm4_moe": _ROUTED | {"use_qk_norm": True} | _HEAD,
    "glm4_moe_lite": _ROUTED | _LATENT | {"mlp_layer_types": ["dense", "sparse"]},
    "glm_moe_dsa": _ROUTED | _LATENT | _INDEXED,
    "gpt_oss": _EXPERTS | {"num_local_experts": 4} | _HEAD | _WINDOWS,
    "granitemoe": _EXPERTS | {"num_local_experts": 4},
    "granitemoe_swa": _EXPERTS
    | {"num_local_experts": 4, "shared_intermediate_size": 96, "layer_rope_theta": [1e4, 1e5]}
    | _WINDOWS,
    "granitemoeshared": _EXPERTS | {"num_local_experts": 4, "shared_intermediate_size": 96},
    "hy_v3": _FOUR | {"num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"]} | _HEAD,
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2} | _HEAD,
    "lfm2_moe": _FOUR
    | {"num_hidden_layers": 3, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "laguna": _FOUR | {"shared_expert_intermediate_size": 64} | _HEAD,
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 160}
    | {"interleave_moe_layer_step": 2}
    | {"no_rope_layers": [1, 0], "attention_chunk_size": 128}  # vLLM's CPU attention has no smaller ones
    | _HEAD,
    "mellum": _FOUR | {"mlp_layer_types": ["dense", "sparse"]} | _HEAD,
    "mimo_v2_flash": _ROUTED | _HEAD | _WINDOWS,
    "minimax_m2": _EXPERTS | {"num_local_experts": 4} | _HEAD,
    "olmoe": _FOUR,
    "qwen2_moe": _FOUR | {"shared_expert_intermediate_size": 96},
}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"], "block_dim": 128, "conv_dim": 128, "block_multiple_of": 32}
_MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 64, "ssm_state_size": 32, "n_groups": 2, "chunk_size": 16}
_GRANITE = {
    "mamba_n_heads": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 32,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
} | {
    "layer_types": ["linear_attention", "full_attention"],
    "shared_intermediate_size": 96,
    "position_embedding_type": "nope",
}
HYBRID: dict[str, dict[str, Any]] = {
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 32, "mamba_n_groups": 2}
    | {"mamba_chunk_size": 16, "ssm_multipliers": [0.5, 0.7, 0.9, 1.1, 1.3], "embedding_multiplier": 3.0}
    | {"mlp_multipliers": [0.7, 1.2], "attention_out_multiplier": 0.8, "key_multiplier": 0.6, "lm_head_multiplier": 0.4}
    | _HEAD,
    "gemma4_small": _GEMMA4
    | {"num_hidden_layers": 6, "layer_types": 3 * ["sliding_attention", "full_attention"], "attention_k_eq_v": False}
    | {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 320}
    | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    "granitemoehybrid": _EXPERTS | _GRANITE | {"num_local_experts": 4},
    "granitemoehybrid_dense": _GRANITE | {"num_local_experts": 0, "num_experts_per_tok": 0},
    "lfm2": _CONVOLUTIONS,
    "nemotron_h": _MAMBA | _HEAD | {"layers_block_type": ["linear_attention", "full_attention", "mlp"]},
    "nemotron_h_moe": _MAMBA
    | _ROUTED
    | _HEAD
    | {
        "layers_block_type": ["linear_attention", "full_attention", "moe"],
        "moe_shared_expert_intermediate_size": 96,
        "moe_latent_size": 64,
    },
    "qwen3_next": _FOUR | {"shared_expert_intermediate_size": 64} | _HEAD | _LINEAR_ATTENTION,
    "qwen3_5_text": _HEAD | _LINEAR_ATTENTION,
    "qwen3_5_moe_text": _FOUR | {"shared_expert_intermediate_size": 64} | _HEAD | _LINEAR_ATTENTION,
}
FAMILIES = DENSE | EXPERTS | HYBRID
"""Model type in transformers -> what differs from the common sizes."""

LIKE_OTHERS = (
    "afmoe", "apertus", "arcee", "axk1", "cohere2_moe", "cwm", "deepseek_v32", "ernie4_5", "ernie4_5_moe",
    "exaone_moe", "falcon_h1", "flex_olmo", "gemma", "gemma4_small", "gemma4_text", "glm", "glm_moe_dsa",
    "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoehybrid_dense", "granitemoeshared",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internvl", "jais2", "lfm2_moe", "lfm2_vl",
    "llama4", "llama4_text", "llava", "llava_next", "llava_onevision", "mellum", "mimo_v2_flash", "minicpm3",
    "minimax_m2", "ministral3", "mistral", "nemotron", "nemotron_h_moe", "olmo", "olmo2", "olmoe", "paligemma",
    "phi", "qwen2_vl", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_vl_moe", "seed_oss", "smollm3", "vaultgemma",
)  # fmt: skip
"""Much like another family: learned and served with GAMMA_FAMILIES=all only."""

NOTHING_NEW = (
    "axk1", "cohere2_moe", "deepseek_v32", "ernie4_5_moe", "flex_olmo", "glm_moe_dsa", "granitemoe_swa",
    "granitemoeshared", "hy_v3",
)  # fmt: skip
"""Those of them that are not even run block by block without GAMMA_FAMILIES."""


def chosen(families: Iterable[str]) -> list[str]:
    """Those of `families` to learn and serve: what GAMMA_FAMILIES names, or all of them, or one of each kind."""
    names = os.environ.get("GAMMA_FAMILIES", "")
    if names == "all":
        return list(families)
    return [name for name in families if (name in names.split(",") if names else name not in LIKE_OTHERS)]


_OWN_KEYS = "vLLM reads keys of config.json that transformers does not write ({})"
_TORCHVISION = "vLLM imports torchvision for it, which its CPU build does not bring"
_ALIKE = "vLLM's CPU build answers otherwise than transformers, without quantization too"
NOT_SERVED: dict[str, str] = {
    "axk1": _ALIKE,
    "cohere2_moe": f"beyond its window {_ALIKE}",
    "ernie4_5_moe": _ALIKE,
    "deepseek_v32": "vLLM has no sparse attention on CPU",
    "glm_moe_dsa": "vLLM has no sparse attention on CPU",
    "hy_v3": _OWN_KEYS.format("first_k_dense_replace"),
    "afmoe": _OWN_KEYS.format("score_func"),
    "cohere2": f"beyond its window {_ALIKE}",
    "deepseek_v2": _ALIKE,
    "deepseek_v3": _ALIKE,
    "nemotron_h_moe": "vLLM's CPU build has no experts without a gate",
    "glm4_moe_lite": _OWN_KEYS.format("first_k_dense_replace"),
    "laguna": "vLLM's CPU build routes by softmax only",
    "mimo_v2_flash": _OWN_KEYS.format("hybrid_layer_pattern"),
    "minimax_m2": _OWN_KEYS.format("rotary_dim"),
    "qwen3_5_moe_text": _TORCHVISION,
    "qwen3_5_text": _TORCHVISION,
}
"""Why vLLM's answers are not those of transformers; the same without quantization."""

MODEL_TYPES = {
    "gemma4_moe": "gemma4_text",
    "gemma4_small": "gemma4_text",
    "granitemoehybrid_dense": "granitemoehybrid",
    "nemotron_h_moe": "nemotron_h",
}
"""What transformers calls a family that is here in more than one way."""

NOT_TRIED = ("vaultgemma",)
"""Not served yet."""

NOT_NAMED = {
    "falcon_h1": "vLLM gives its Mamba layers the numbers of other blocks, so that their formats cannot be told"
}
"""Why the plugin refuses what vLLM serves without quantization."""

_OWN_ROTATION = {"compilation_config": {"custom_ops": ["none", "-rotary_embedding"]}}
"""vLLM's rotation for CPUs is wrong for queries of three dimensions, as LFM2's are; its PyTorch code is not."""
SERVED_WITH: dict[str, dict[str, Any]] = {
    "lfm2": _OWN_ROTATION,
    "lfm2_moe": _OWN_ROTATION,
    "qwen3_next": {"dtype": "bfloat16"},  # all that vLLM's CPU build has for it
}
"""Options without which vLLM's CPU build does not answer as transformers does, without quantization neither."""


def make_family(model_type: str, folder: Path) -> Path:
    """Write a random model to `folder`, which is returned; biases and what begins as ones or zeros are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(MODEL_TYPES.get(model_type, model_type), **(SIZES | FAMILIES[model_type]))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
_PATCHES = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128}
_TOWER = _VISION | {"num_hidden_layers": 1}
_CLIP = {"vision_config": {"model_type": "clip_vision_model"} | _TOWER}
_SIGLIP = {"vision_config": {"model_type": "siglip_vision_model"} | _TOWER}
_ROTATION = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [6, 5, 5]}
WRAPPERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "internvl": (
        "qwen2",
        {"vision_config": _TOWER | {"image_size": [56, 56], "patch_size": [14, 14]}},
        {},
    ),
    "lfm2_vl": ("lfm2", {"vision_config": _TOWER | {"num_patches": 16}}, _CONVOLUTIONS),
    "llama4": (
        "llama4_text",
        {"vision_config": _TOWER | {"vision_output_dim": 64, "projector_input_dim": 64}},
        EXPERTS["llama4_text"] | {"pad_token_id": 0},
    ),
    "llava": ("llama", _CLIP, {}),
    "llava_next": ("llama", _CLIP, {}),
    "llava_onevision": ("qwen2", _SIGLIP, {}),
    "paligemma": ("gemma", _SIGLIP, _HEAD),
    "qwen2_vl": (
        "qwen2_vl_text",
        {"vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2}},
        {"rope_parameters": _ROTATION},
    ),
    "qwen3_5_moe": ("qwen3_5_moe_text", {"vision_config": _PATCHES}, HYBRID["qwen3_5_moe_text"]),
    "qwen3_vl_moe": (
        "qwen3_vl_moe_text",
        {"vision_config": _PATCHES | {"deepstack_visual_indexes": [0]}},
        _FOUR | _HEAD | {"rope_parameters": _ROTATION | {"mrope_interleaved": True}},
    ),
    "gemma3": ("gemma3_text", {"vision_config": _TOWER, "mm_tokens_per_image": 4}, _HEAD),
    "gemma4": (
        "gemma4_text",
        {"vision_config": _TOWER | {"head_dim": 16, "num_key_value_heads": 2}},
        _GEMMA4 | {"tie_word_embeddings": False, "pad_token_id": 0},
    ),
    "mistral3": ("mistral", {"vision_config": _TOWER | {"head_dim": 16}}, _HEAD),
    "qwen3_5": (
        "qwen3_5_text",
        {"vision_config": _PATCHES},
        _HEAD | _LINEAR_ATTENTION,
    ),
    "qwen2_5_vl": ("qwen2_5_vl_text", {"vision_config": _PATCHES}, {"rope_parameters": _ROTATION}),
    "qwen3_vl": (
        "qwen3_vl_text",
        {"vision_config": _PATCHES | {"deepstack_visual_indexes": [0]}},
        _HEAD | {"rope_parameters": _ROTATION | {"mrope_interleaved": True}},
    ),
}
"""Multimodal model type -> that of its language model, what it has beside, and what differs in the language model."""

SERVED_AS = {"gemma4": "Gemma4ForCausalLM"}
"""Multimodal model type -> the architecture that vLLM's CPU build serves its language model as (`--hf-overrides`)."""


def make_wrapper(model_type: str, folder: Path) -> Path:
    """Write a random multimodal model to `folder`, which is returned."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text_type, beside, changes = WRAPPERS[model_type]
    text = AutoConfig.for_model(text_type, **(SIZES | changes)).to_dict()
    config = AutoConfig.for_model(model_type, text_config=text, tie_word_embeddings=False, **beside)
    torch.manual_seed(1)
    AutoModelForImageTextToText.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
