"""Experts one by one, as checkpoints of ours have them, put back into the tensors that transformers reads."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from allocator.blocks.hf_model import model_class
from allocator.model import ModelShape
from allocator.model.expert_stacks import matrices_of

__all__ = ["as_transformers_writes"]


def as_transformers_writes(state: Mapping[str, Tensor], shape: ModelShape, config: Any) -> dict[str, Tensor]:
    """`state` (tensors by the names of a checkpoint) with the experts of a block in one tensor, where transformers
    writes a model of `config` so; else as it is."""
    if shape.experts is None:
        return dict(state)
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = model_class(config)(config)
    found, layout = dict(state), shape.experts.layout
    for stack in revert_weight_conversion(model, model.state_dict()):
        modules = [f"{module}.weight" for module in matrices_of(stack, layout)]
        if not modules or modules[0].replace("{e}", "0") not in found:
            continue
        matrices = [
            torch.cat([found.pop(module.replace("{e}", str(expert))) for module in modules])
            for expert in range(shape.experts.count)
        ]
        found[stack] = torch.stack([matrix if layout == "rows" else matrix.T for matrix in matrices])
    return found
