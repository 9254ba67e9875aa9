"""The same model with its weights off the grid of the file that they come from, by exact rescaling.

Weights that were stored at 4 bits lie on a grid, and a candidate whose grid falls on it would look better than it is.
Norm gains are multiplied into the columns that follow; value and up channels are scaled, and the columns of o_proj and
down_proj that read them divided, by factors drawn between 1 and 2. Columns of one group then differ in scale, which no
grid of a group follows. The function of the model is the same, up to the rounding of its dtype.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from allocator.contract.errors import InputError

__all__ = ["RESCALABLE", "rescaled", "write_rescaled"]

RESCALABLE = ("llama", "qwen2", "qwen3")
"""Types of models."""

_READ_NORM = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def rescaled(weights: dict[str, Tensor], config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Of a model of one of the RESCALABLE types: its weights by name in float32, rescaled. InputError for another."""
    if config["model_type"] not in RESCALABLE:
        raise InputError(f"models of type {config['model_type']} are not rescaled here; {RESCALABLE} are")
    found = {name: weight.float() for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    queries = config["num_attention_heads"] // config["num_key_value_heads"]
    for index in range(config["num_hidden_layers"]):
        block = f"model.layers.{index}."
        for norm, readers in _READ_NORM.items():
            gain = found[f"{block}{norm}.weight"]
            for reader in readers:
                found[f"{block}{reader}.weight"] *= gain
            found[f"{block}{norm}.weight"] = torch.ones_like(gain)
        values = _factors(len(found[f"{block}self_attn.v_proj.weight"]), generator)
        _scale_rows(found, f"{block}self_attn.v_proj", values)
        of_query = values.view(-1, head_dim).repeat_interleave(queries, 0).flatten()
        found[f"{block}self_attn.o_proj.weight"] /= of_query
        channels = _factors(len(found[f"{block}mlp.up_proj.weight"]), generator)
        _scale_rows(found, f"{block}mlp.up_proj", channels)
        found[f"{block}mlp.down_proj.weight"] /= channels
    return found


def write_rescaled(source: Path, folder: Path) -> None:
    """The model folder `source`, rescaled, in its own dtype."""
    config = json.loads((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    dtypes = {name: weight.dtype for name, weight in weights.items()}
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns("*.safetensors"))
    found = {name: weight.to(dtypes[name]).contiguous() for name, weight in rescaled(weights, config).items()}
    save_file(found, partial / "model.safetensors", {"format": "pt"})
    partial.rename(folder)


def _factors(count: int, generator: torch.Generator) -> Tensor:
    return 2 ** torch.rand(count, generator=generator)


def _scale_rows(weights: dict[str, Tensor], module: str, factors: Tensor) -> None:
    weights[f"{module}.weight"] *= factors[:, None]
    if f"{module}.bias" in weights:
        weights[f"{module}.bias"] *= factors
