"""Tiny models with all the tensors of their architecture, written by hand so that each test can spoil one thing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 50,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    name: BASE | {"architectures": [name]}
    for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
}

Tensors = dict[str, torch.Tensor]


def tensors_of(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Tensors:
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}"
        linears = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
        shapes |= {f"{block}.self_attn.{n}_proj.weight": s for n, s in linears.items()}
        mlp = {"gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}
        shapes |= {f"{block}.mlp.{n}_proj.weight": s for n, s in mlp.items()}
        shapes |= {f"{block}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        if config["architectures"] == ["Qwen2ForCausalLM"]:
            shapes |= {f"{block}.self_attn.{n}_proj.bias": (linears[n][0],) for n in "qkv"}
        if config["architectures"] == ["Qwen3ForCausalLM"]:
            shapes |= {f"{block}.self_attn.{n}_norm.weight": (head,) for n in "qk"}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """make_model(architecture, dtype, spoil, **config): `spoil(config, tensors)` changes them before the writing."""
    count = iter(range(1000))

    def make(
        architecture: str = "LlamaForCausalLM",
        dtype: torch.dtype = torch.bfloat16,
        spoil: Callable[[dict[str, Any], Tensors], object] | None = None,
        **changes: Any,
    ) -> Path:
        config = CONFIGS[architecture] | changes
        tensors = tensors_of(config, dtype)
        if spoil is not None:
            spoil(config, tensors)
        return write(tmp_path / f"model-{next(count)}", config, tensors)

    return make
