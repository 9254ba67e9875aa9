"""Gamma checkpoints for the tests of serving: round-to-nearest, without learning and without the exporter.

`make_checkpoint` writes a checkpoint folder, `write_dequantized` the same model as plain float32 weights for
Hugging Face transformers, which is what vLLM's answers are compared with.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from allocator.blocks.hf_model import open_config
from allocator.blocks.stacked_state import as_transformers_writes
from allocator.blocks.tensors import read_tensor
from allocator.contract.bank import ModelReference
from allocator.contract.checkpoint import CheckpointConfig
from allocator.contract.digest import digest_bytes
from allocator.contract.layout import ModuleFormat, module_bytes, module_tensors, usable_group_size
from allocator.contract.manifest import MANIFEST_NAME, Budget, Manifest
from allocator.contract.packing import dequantize, pack_codes, pack_zero_points
from allocator.model import carry, read_inventory, read_shape

__all__ = ["ChooseFormat", "make_checkpoint", "quantize", "widen_heads", "write_dequantized"]

ChooseFormat = Callable[[str], tuple[int, int, bool]]
"""Module name -> (width, largest group size, symmetric)."""

_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def make_checkpoint(source: Path, target: Path, choose: ChooseFormat) -> CheckpointConfig:
    """Quantize every module of the model folder `source` as `choose` says, and write a checkpoint."""
    target.mkdir(parents=True)
    tensors, modules = {}, {}
    inventory = read_inventory(source)
    known = {module.name: module for module in inventory.modules}
    for stored in inventory.tensors:
        name, tensor = stored.name, read_tensor(stored)
        module = name.removesuffix(".weight")
        if module not in known:
            tensors[name] = tensor
            continue
        num_bits, group_size, symmetric = (16, 0, True) if known[module].why_16 else choose(module)
        usable = usable_group_size(tensor.shape[1], group_size) if num_bits != 16 else None
        stored, modules[module] = quantize(tensor, num_bits, usable, symmetric)
        tensors |= {f"{module}.{part}": value for part, value in stored.items()}

    declared = {t.name for name, module in modules.items() for t in module_tensors(name, module, "BF16")}
    other_bytes = sum(t.nbytes for n, t in tensors.items() if n not in declared)
    sizes = {name: module_bytes(module) for name, module in modules.items()}
    total = other_bytes + sum(sizes.values())
    config = dict(inventory.config)
    manifest = Manifest(
        model=ModelReference(name=source.name, architecture=config["architectures"][0], digest=digest_bytes(b"model")),
        bank_digest=digest_bytes(b"bank"),
        method="test",
        dtype="BF16",
        budget=Budget(requested="everything", nbytes=total),
        tensor_bytes=total,
        other_bytes=other_bytes,
        module_bytes=sizes,
        modules=modules,
    )
    manifest.write(target / MANIFEST_NAME)
    quantization = CheckpointConfig.of_manifest(manifest)
    config["quantization_config"] = quantization.model_dump(mode="json", exclude_none=True)
    (target / "config.json").write_text(json.dumps(config, indent=1))
    carry(inventory, target)
    save_file({n: t.contiguous() for n, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return quantization


def quantize(
    weight: Tensor, num_bits: int, group_size: int | None, symmetric: bool
) -> tuple[dict[str, Tensor], ModuleFormat]:
    """Round a weight `[N, K]` to nearest: the tensors of the module as stored, and its format."""
    rows, columns = weight.shape
    if num_bits == 16 or group_size is None:
        return {"weight": weight.to(torch.bfloat16)}, ModuleFormat(shape=(rows, columns), num_bits=16)
    grouped = weight.to(torch.float32).reshape(rows, -1, group_size)
    levels = (1 << num_bits) - 1
    if symmetric:
        zero = torch.full(grouped.shape[:2], 1 << (num_bits - 1))
        scale = grouped.abs().amax(-1) / max((1 << (num_bits - 1)) - 0.5, 1)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = (high - low) / levels
        zero = (-low / scale.clamp(min=1e-12)).round().clamp(0, levels).to(torch.int64)
    scale = scale.clamp(min=1e-8).to(torch.bfloat16)
    codes = (grouped / scale.to(torch.float32).unsqueeze(-1)).round() + zero.unsqueeze(-1)
    stored = {
        "weight_packed": pack_codes(codes.clamp(0, levels).to(torch.int64).reshape(rows, columns), num_bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }
    if not symmetric:
        stored["weight_zero_point"] = pack_zero_points(zero, num_bits)
    module = ModuleFormat(shape=(rows, columns), num_bits=num_bits, group_size=group_size, symmetric=symmetric)  # type: ignore[arg-type]
    return stored, module


def write_dequantized(checkpoint: Path, target: Path) -> None:
    """The model that `checkpoint` stands for, with float32 weights and no quantization_config."""
    target.mkdir(parents=True)
    config = json.loads((checkpoint / "config.json").read_text())
    modules = CheckpointConfig.parse(config.pop("quantization_config")).modules
    stored = load_file(checkpoint / "model.safetensors")
    tensors = {n: t.to(torch.float32) for n, t in stored.items() if n.rpartition(".")[2] not in _PARTS}
    for name, module in modules.items():
        if module.quantized:
            parts = (stored.get(f"{name}.{p}") for p in ("weight_packed", "weight_scale", "weight_zero_point"))
            tensors[f"{name}.weight"] = dequantize(*parts, module.num_bits)  # type: ignore[arg-type]
    (target / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    _copy_others(checkpoint, target)
    tensors = as_transformers_writes(tensors, read_shape(config), open_config(target))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def _copy_others(source: Path, target: Path) -> None:
    for path in source.glob("*.json"):
        if path.name not in ("config.json", MANIFEST_NAME, "model.safetensors.index.json"):
            shutil.copy(path, target)


def widen_heads(source: Path, target: Path, factor: int) -> None:
    """The same model with `factor` times the head size, for vLLM's CPU attention, which has none below 32.

    Exact in real numbers: the rotary frequency of pair i in head size d is that of pair `factor * i` in head
    size `factor * d`, so the weights go there, zeros fill the rest, and q_proj takes the softmax divisor.
    """
    target.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    old = config["head_dim"]
    half, new = old // 2, old * factor
    place = torch.cat([torch.arange(half) * factor, new // 2 + torch.arange(half) * factor])
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        leaf = name.split(".")[-2]
        if leaf in ("q_proj", "k_proj", "v_proj"):
            wide = tensor.new_zeros(tensor.shape[0] // old, new, tensor.shape[1])
            wide[:, place] = tensor.view(-1, old, tensor.shape[1]) * (factor**0.5 if leaf == "q_proj" else 1)
            tensors[name] = wide.view(-1, tensor.shape[1])
        elif leaf == "o_proj":
            wide = tensor.new_zeros(tensor.shape[0], tensor.shape[1] // old, new)
            wide[:, :, place] = tensor.view(tensor.shape[0], -1, old)
            tensors[name] = wide.view(tensor.shape[0], -1)
    (target / "config.json").write_text(json.dumps(config | {"head_dim": new}, indent=1))
    _copy_others(source, target)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
