"""Checkpoints of other programs, with different widths inside fused layers: what stock vLLM cannot load."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["write_compressed_tensors", "write_gptq"]

GROUP_SIZE = 64
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Widths = Callable[[str], int]


def write_compressed_tensors(source: Path, target: Path, widths: Widths, symmetric: bool) -> None:
    """By the compressor of compressed-tensors itself; a target for each module, as llm-compressor writes them."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    groups: dict[str, Any] = {}
    stored: dict[str, Tensor] = {}
    for name, weight, _codes, scale, zeros in _quantized(source, widths, symmetric):
        weights = {"num_bits": widths(name), "type": "int", "symmetric": symmetric, "strategy": "group"}
        weights |= {"group_size": GROUP_SIZE}
        scheme = QuantizationScheme(targets=[name], weights=weights)
        middle = 1 << (widths(name) - 1)
        state = {"weight": weight, "weight_scale": scale}
        if not symmetric:
            state["weight_zero_point"] = (zeros - middle).to(torch.int8)
        made = PackedQuantizationCompressor.compress(state, scheme)
        stored |= {f"{name}.{part}": tensor.contiguous() for part, tensor in made.items()}
        groups[f"group_{len(groups)}"] = {"targets": [name], "weights": weights, "format": "pack-quantized"}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    _write(source, target, stored, config | {"config_groups": groups, "ignore": ["lm_head"]})


def write_gptq(source: Path, target: Path, widths: Widths, packing_format: str) -> None:
    """In auto-round's layout, with its `extra_config`; zero points less one where the packing format says so."""
    stored: dict[str, Tensor] = {}
    extra = {}
    for name, _weight, codes, scale, zeros in _quantized(source, widths, False):
        bits = widths(name)
        extra[name] = {"bits": bits, "group_size": GROUP_SIZE, "sym": False}
        shown = zeros if packing_format == "auto_round" else zeros - 1
        stored[f"{name}.qweight"] = _stream(codes, bits).T.contiguous()
        stored[f"{name}.qzeros"] = _stream((shown & ((1 << bits) - 1)).T, bits)
        stored[f"{name}.scales"] = scale.T.contiguous().to(torch.float16)
        stored[f"{name}.g_idx"] = (torch.arange(codes.shape[1]) // GROUP_SIZE).to(torch.int32)
    config = {"quant_method": "auto-round", "bits": 4, "group_size": GROUP_SIZE, "sym": False}
    _write(source, target, stored, config | {"packing_format": packing_format, "extra_config": extra})


def _quantized(source: Path, widths: Widths, symmetric: bool) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    """Name, weight as dequantized, codes `[N, K]`, scales and zero points `[N, groups]` of every linear module."""
    for key, tensor in load_file(source / "model.safetensors").items():
        name = key.removesuffix(".weight")
        if name.rpartition(".")[2] not in _LINEAR:
            continue
        top = (1 << widths(name)) - 1
        grouped = tensor.to(torch.float32).reshape(tensor.shape[0], -1, GROUP_SIZE)
        low, high = grouped.amin(-1), grouped.amax(-1)
        if symmetric:
            zeros = torch.full_like(low, 1 << (widths(name) - 1)).to(torch.int32)
            scale = torch.maximum(-low, high) / max(top // 2, 1)
        else:
            scale = (high - low) / top
            zeros = (-low / scale).round().clamp(1, top).to(torch.int32)
        scale = scale.to(torch.float16).to(torch.float32)
        codes = ((grouped / scale.unsqueeze(-1)).round() + zeros.unsqueeze(-1)).clamp(0, top)
        weight = ((codes - zeros.unsqueeze(-1)) * scale.unsqueeze(-1)).reshape(tensor.shape)
        yield name, weight, codes.to(torch.int32).reshape(tensor.shape), scale, zeros


def _stream(codes: Tensor, bits: int) -> Tensor:
    """Bits of the codes one after the other along the last dimension, lowest first, in words of 32."""
    places = torch.arange(bits)
    ones = ((codes.to(torch.int64).unsqueeze(-1) >> places) & 1).flatten(1).reshape(codes.shape[0], -1, 32)
    words = (ones << torch.arange(32)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _write(source: Path, target: Path, quantized: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    """The checkpoint, and beside it in `TARGET-dequantized` what transformers answers with."""
    config = json.loads((source / "config.json").read_text())
    modules = {name.rpartition(".")[0] for name in quantized}
    others = {
        name: tensor for name, tensor in load_file(source / "model.safetensors").items()
        if name.removesuffix(".weight") not in modules
    }  # fmt: skip
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    save_file(others | quantized, target / "model.safetensors", {"format": "pt"})
    for path in source.glob("tokenizer*"):
        shutil.copy(path, target)


def write_dequantized(source: Path, target: Path, widths: Widths, symmetric: bool) -> None:
    """The same model with float32 weights and no quantization_config."""
    target.mkdir(parents=True)
    tensors = {n: t.to(torch.float32) for n, t in load_file(source / "model.safetensors").items()}
    tensors |= {f"{name}.weight": weight for name, weight, *_ in _quantized(source, widths, symmetric)}
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
