"""Tiny random models of every kind of layer that the plugin serves, for vLLM's CPU attention (heads of 32 and more)."""

from pathlib import Path

import torch

from tests.families import SIZES

__all__ = ["KINDS", "make_model"]

_SIZES = SIZES | {"vocab_size": 200, "intermediate_size": 256}  # vLLM pads the vocabulary to 256
_EXPERTS = {"num_experts_per_tok": 2}

KINDS = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"head_dim": 64, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "phi3": ("Phi3", {}),
    "gemma3": ("Gemma3", {"head_dim": 64, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 8, "moe_intermediate_size": 64, "head_dim": 32} | _EXPERTS),
    "mixtral": ("Mixtral", {"num_local_experts": 4} | _EXPERTS),
}
"""Name -> (prefix of the classes in transformers, what differs from the common sizes)."""


def make_model(kind: str, folder: Path) -> Path:
    """Write a random model of `kind` to `folder`, which is returned."""
    import transformers

    name, changes = KINDS[kind]
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    config = config_class(**(_SIZES | changes))
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder
