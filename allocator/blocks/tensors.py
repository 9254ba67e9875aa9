"""Reads single tensors of a safetensors folder, and writes files of them."""

import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from allocator.blocks.dequantize import dequantized, dequantized_rows
from allocator.contract.safetensors_file import StoredTensor
from allocator.model import ArrangedTensor
from allocator.model.expert_stacks import ExpertMatrix
from allocator.model.quantized_source import DequantizedTensor

__all__ = ["read_rows", "read_tensor", "torch_dtype", "write_safetensors"]


def read_tensor(stored: StoredTensor, device: str | torch.device = "cpu") -> Tensor:
    """One tensor as it is stored, dequantized if it is a quantized weight, rows or columns arranged as it says."""
    if isinstance(stored, ArrangedTensor):
        whole = read_tensor(stored.source)
        if stored.rows is not None:
            whole = whole[torch.tensor(stored.rows)]
        if stored.columns is not None:
            whole = whole[:, torch.tensor(stored.columns)]
        return whole.to(device)
    if isinstance(stored, ExpertMatrix):
        return read_rows(stored, slice(None), device)
    if isinstance(stored, DequantizedTensor):
        return dequantized(stored).to(device)
    with safe_open(stored.path, framework="pt", device=str(device)) as file:
        tensor: Tensor = file.get_tensor(stored.stored_as or stored.name)
    return tensor


def read_rows(stored: StoredTensor, rows: slice, device: str | torch.device = "cpu") -> Tensor:
    """Some rows of `read_tensor`; the others are not read."""
    if isinstance(stored, ArrangedTensor):
        if stored.rows is not None:
            stored = replace(stored, rows=stored.rows[rows])
            return read_tensor(stored, device)
        part = read_rows(stored.source, rows)
        return (part if stored.columns is None else part[:, torch.tensor(stored.columns)]).to(device)
    if isinstance(stored, ExpertMatrix):
        start, stop, step = rows.indices(stored.shape[0])
        within = slice(stored.first_row + start, stored.first_row + stop, step)
        if isinstance(stored.stack, DequantizedTensor):
            return dequantized_rows(stored.stack, within, stored.expert).to(device)
        with safe_open(stored.path, framework="pt", device=str(device)) as file:
            stack = file.get_slice(stored.stack.stored_as or stored.stack.name)
            matrix: Tensor = stack[stored.expert, :, within].T if stored.transposed else stack[stored.expert, within]
        return matrix.contiguous()
    if isinstance(stored, DequantizedTensor):
        return dequantized_rows(stored, rows).to(device)
    with safe_open(stored.path, framework="pt", device=str(device)) as file:
        found: Tensor = file.get_slice(stored.stored_as or stored.name)[rows]
    return found


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a 16-bit safetensors name."""
    return {"BF16": torch.bfloat16, "F16": torch.float16}[name]


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file atomically, readable for others: servers often run as another user."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        os.chmod(temporary, 0o644)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
