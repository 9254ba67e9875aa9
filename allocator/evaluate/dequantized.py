"""A gamma checkpoint as an ordinary transformers model, its modules dequantized: the judge of every kernel."""

from pathlib import Path
from typing import Any

import torch

from allocator.blocks.hf_model import model_class, open_config
from allocator.blocks.stacked_state import as_transformers_writes
from allocator.blocks.tensors import read_tensor
from allocator.contract.checkpoint import check_checkpoint
from allocator.contract.modules import Rows
from allocator.contract.packing import dequantize
from allocator.contract.safetensors_file import read_folder_headers
from allocator.model import read_shape
from allocator.model.hf_config import read_config

__all__ = ["load_dequantized"]


def load_dequantized(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The causal language model of a gamma checkpoint, weights dequantized in float32 and then cast to `dtype`.

    Raises ContractError when the folder is not what it declares.
    """
    declared, _manifest = check_checkpoint(folder)
    stored = read_folder_headers(folder)
    config = open_config(folder)
    state = {}
    for name, module in declared.modules.items():
        if not module.quantized:
            continue
        parts = {p: read_tensor(t) for p in _PARTS if (t := stored.pop(f"{name}.{p}", None)) is not None}
        state[f"{name}.weight"] = dequantize(
            parts["weight_packed"], parts["weight_scale"], parts.get("weight_zero_point"), module.num_bits
        ).to(dtype)
    state |= {name: read_tensor(tensor).to(dtype) for name, tensor in stored.items()}
    for original, modules in declared.parents.rows().items():
        state[f"{original}.weight"] = _joined([(state.pop(f"{name}.weight"), rows) for name, rows in modules.items()])
    state = as_transformers_writes(state, read_shape(read_config(folder)), config)
    # Through transformers' own loading: a checkpoint has names of its own, and experts one by one.
    model, told = model_class(config).from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    missing, unexpected = told["missing_keys"], told["unexpected_keys"]
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise RuntimeError(f"{folder}: transformers wants {sorted(missing)} and does not know {sorted(unexpected)}")
    return model.eval().requires_grad_(False)


def _joined(parts: list[tuple[torch.Tensor, Rows]]) -> torch.Tensor:
    """One weight `[N, K]` of weights `[n, K]` and their rows of it."""
    if len(parts) == 1:
        return parts[0][0]
    whole = parts[0][0].new_empty(sum(len(rows) for _, rows in parts), parts[0][0].shape[1])
    for weight, rows in parts:
        whole[rows.numbers()] = weight
    return whole


_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
