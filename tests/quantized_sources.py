"""Models quantized as others publish them, written from an ordinary one; and the weights that they stand for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["METHODS", "quantize_experts", "quantize_model"]

_CODES = torch.float8_e4m3fn
_Parts = tuple[dict[str, Tensor], Tensor]
"""The tensors of a module by the last part of their names, and the weight `[N, K]` that they stand for."""


def _fp8(weight: Tensor, rows: int, columns: int, scale_name: str, *, flat: bool = False) -> _Parts:
    """One scale for each block of `rows` x `columns`."""
    parts, restored = {}, torch.empty_like(weight)
    scale = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    codes = torch.empty(weight.shape, dtype=_CODES)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scale[i, j] = weight[place].abs().max() / 448
            codes[place] = (weight[place] / scale[i, j]).to(_CODES)
            restored[place] = codes[place].float() * scale[i, j]
    parts = {"weight": codes, scale_name: scale.flatten()[0].clone() if flat else scale}
    return parts, restored


def _integers(weight: Tensor, bits: int, group: int, *, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes as compressed-tensors has them (about zero) `[N, K]`, scales in bfloat16 and zero points `[N, K/group]`."""
    grouped = weight.unflatten(1, (-1, group))
    low, high = grouped.amin(-1), grouped.amax(-1)
    half = 2 ** (bits - 1)
    if symmetric:
        scale = (torch.maximum(-low, high) / (half - 1)).bfloat16()
        zero = torch.zeros_like(scale, dtype=torch.int8)
    else:
        scale = ((high - low) / (2 * half - 1)).bfloat16()
        zero = (-low / scale.float() - half).round().clamp(-half, half - 1).to(torch.int8)
    codes = (grouped / scale.float()[..., None] + zero[..., None]).round().clamp(-half, half - 1)
    return codes.flatten(1).to(torch.int8), scale, zero


def _restored(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    grouped = codes.float().unflatten(1, (-1, group)) - zero.float()[..., None]
    return (grouped * scale.float()[..., None]).flatten(1)


def _int8(weight: Tensor) -> _Parts:
    codes, scale, zero = _integers(weight, 8, weight.shape[1], symmetric=True)
    return {"weight": codes, "weight_scale": scale}, _restored(codes, scale, zero, weight.shape[1])


def _packed(weight: Tensor, bits: int, *, symmetric: bool) -> _Parts:
    codes, scale, zero = _integers(weight, bits, 32, symmetric=symmetric)
    parts = {"weight_packed": _words(codes, bits), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    if not symmetric:
        parts["weight_zero_point"] = _words(zero.T, bits).T.contiguous()
    return parts, _restored(codes, scale, zero, 32)


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes about zero -> 32-bit words of them along the last axis, offset to begin at zero, the first lowest."""
    offset = codes.to(torch.int64) + 2 ** (bits - 1)
    full = torch.nn.functional.pad(offset, (0, -codes.shape[1] % (32 // bits)))
    words = (full.unflatten(1, (-1, 32 // bits)) << (bits * torch.arange(32 // bits))).sum(-1)
    return words.to(torch.uint32).view(torch.int32)


_FLOAT4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])


def _float4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """4-bit floats, two in a byte `[N, K/2]`, exponents of their scales plus 127 `[N, K/group]`, and their values."""
    grouped = weight.unflatten(-1, (-1, group))
    exponent = torch.floor(torch.log2(grouped.abs().amax(-1))) - 2
    scaled = grouped / torch.exp2(exponent)[..., None]
    number = (scaled.abs()[..., None] - _FLOAT4).abs().argmin(-1)
    values = torch.copysign(_FLOAT4[number], scaled) * torch.exp2(exponent)[..., None]
    nibbles = (number + 8 * (scaled < 0)).flatten(-2).unflatten(-1, (-1, 2))
    packed = (nibbles[..., 0] + 16 * nibbles[..., 1]).to(torch.uint8)
    return packed, (exponent + 127).to(torch.uint8), values.flatten(-2)


def _mxfp4(weight: Tensor) -> _Parts:
    packed, scale, values = _float4(weight, 32)
    return {"weight_packed": packed, "weight_scale": scale}, values


def _nvfp4(weight: Tensor) -> _Parts:
    """4-bit floats in groups of 16, scales in 8-bit floats, and one scale of these."""
    whole = torch.tensor([448 * 6 / float(weight.abs().max())])
    grouped = weight.unflatten(1, (-1, 16))
    scale = (grouped.abs().amax(-1) / 6 * whole).to(_CODES)
    number = ((grouped / (scale.float() / whole)[..., None]).abs()[..., None] - _FLOAT4).abs().argmin(-1)
    nibbles = (number + 8 * (grouped < 0)).flatten(1).unflatten(1, (-1, 2))
    packed = (nibbles[..., 0] + 16 * nibbles[..., 1]).to(torch.uint8)
    values = torch.copysign(_FLOAT4[number], grouped) * (scale.float() / whole)[..., None]
    return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": whole}, values.flatten(1)


def _mxfp8(weight: Tensor) -> _Parts:
    grouped = weight.unflatten(1, (-1, 32))
    exponent = torch.floor(torch.log2(grouped.abs().amax(-1))) - 8
    codes = (grouped / torch.exp2(exponent)[..., None]).clamp(-448, 448).to(_CODES)
    values = codes.float() * torch.exp2(exponent)[..., None]
    return {"weight": codes.flatten(1), "weight_scale": (exponent + 127).to(torch.uint8)}, values.flatten(1)


def _group(form: str, num_bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": num_bits, "type": kind, "strategy": strategy, "symmetric": True} | more
    group = {"targets": ["Linear"], "weights": weights}
    compressed = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    return compressed | {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
METHODS: dict[str, tuple[dict[str, Any], Callable[[Tensor], _Parts]]] = {
    "fp8 in blocks": (_FP8 | {"weight_block_size": [32, 32]}, lambda w: _fp8(w, 32, 32, "weight_scale_inv")),
    "fp8 in blocks that do not divide": (
        _FP8 | {"weight_block_size": [40, 48]},
        lambda w: _fp8(w, 40, 48, "weight_scale_inv"),
    ),
    "fp8 by tensor": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        lambda w: _fp8(w, *w.shape, "weight_scale", flat=True),
    ),
    "fp8 by row": (
        _group("float-quantized", 8, "float", "channel"),
        lambda w: _fp8(w, 1, w.shape[1], "weight_scale"),
    ),
    "compressed-tensors in blocks": (
        _group("float-quantized", 8, "float", "block", block_structure=[40, 48]),
        lambda w: _fp8(w, 40, 48, "weight_scale"),
    ),
    "int8": (_group("int-quantized", 8, "int", "channel"), _int8),
    "w4a16": (
        _group("pack-quantized", 4, "int", "group", group_size=32),
        lambda w: _packed(w, 4, symmetric=True),
    ),
    "w4a16 with zero points": (
        _group("pack-quantized", 4, "int", "group", group_size=32, symmetric=False),
        lambda w: _packed(w, 4, symmetric=False),
    ),
    "mxfp8": (_group("mxfp8-quantized", 8, "float", "group", group_size=32), _mxfp8),
    "nvfp4": (_group("nvfp4-pack-quantized", 4, "float", "tensor_group", group_size=16), _nvfp4),
    "mxfp4": (_group("mxfp4-pack-quantized", 4, "float", "group", group_size=32), _mxfp4),
}
"""Name -> quantization_config, and what makes the tensors of one module."""

_NOT = ("embed_tokens", "lm_head", "norm")


def quantize_model(plain: Path, folder: Path, method: str) -> dict[str, Tensor]:
    """Write the model of `plain` to `folder` with the linear modules of its blocks quantized, and scales of activations
    beside them. Returns the weights of the dequantized model, bfloat16, by tensor name."""
    declared, make = METHODS[method]
    shutil.copytree(plain, folder)
    stored, expected = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        expected[name] = tensor
        if tensor.ndim != 2 or any(part in name for part in _NOT):
            stored[name] = tensor
            continue
        parts, weight = make(tensor.float())
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{leaf}": part for leaf, part in parts.items()}
        stored[f"{module}.input_scale"] = torch.tensor(1.0)
        expected[name] = weight.bfloat16()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": declared}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


def quantize_experts(plain: Path, folder: Path) -> None:
    """Write the gpt-oss of `plain` to `folder` as it is published: stacks of experts in 4-bit floats."""
    shutil.copytree(plain, folder)
    stored = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if tensor.ndim != 3:
            stored[name] = tensor
            continue
        packed, scale, _ = _float4(tensor.float().transpose(1, 2), 32)
        stored |= {f"{name}_blocks": packed.unflatten(-1, (-1, 16)), f"{name}_scales": scale}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
