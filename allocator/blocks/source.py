"""Reads single tensors of a safetensors folder."""

import torch
from safetensors import safe_open
from torch import Tensor

from allocator.contract.safetensors_file import StoredTensor

__all__ = ["read_tensor", "torch_dtype"]


def read_tensor(stored: StoredTensor, device: str | torch.device = "cpu") -> Tensor:
    """One tensor as it is stored."""
    with safe_open(stored.path, framework="pt", device=str(device)) as file:
        tensor: Tensor = file.get_tensor(stored.name)
    return tensor


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a 16-bit safetensors name."""
    return {"BF16": torch.bfloat16, "F16": torch.float16}[name]
