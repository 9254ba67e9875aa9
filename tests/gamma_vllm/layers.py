"""Declared modules with random tensors, and their way into a layer of vLLM."""

import torch

from allocator.contract.checkpoint import CheckpointConfig
from allocator.contract.layout import ModuleFormat, module_tensors
from allocator.contract.packing import dequantize, pack_zero_points, unpack_zero_points
from gamma_vllm.config import GammaConfig

__all__ = ["declare", "gamma_config", "load", "stored_tensors"]

DIGEST = "sha256:" + "0" * 64
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
TORCH_DTYPES = {"BF16": torch.bfloat16, "I32": torch.int32, "I64": torch.int64}


def declare(rows, columns, num_bits, group_size=32, symmetric=True):
    if num_bits == 16:
        return ModuleFormat(shape=(rows, columns), num_bits=16)
    return ModuleFormat(shape=(rows, columns), num_bits=num_bits, group_size=group_size, symmetric=symmetric)


def gamma_config(modules, channel_blocks=None):
    checkpoint = CheckpointConfig(
        model_digest=DIGEST, manifest_digest=DIGEST, dtype="BF16", channel_blocks=channel_blocks, modules=modules
    )
    config = GammaConfig(checkpoint)
    config.packed_modules_mapping.update(FUSED)
    return config


def stored_tensors(declared, seed):
    """Random tensors of one module as a checkpoint has them, and its weight in float32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in module_tensors("", declared, "BF16"):
        part, dtype = spec.name[1:], TORCH_DTYPES[spec.dtype]
        if dtype == torch.bfloat16:
            tensors[part] = (torch.rand(spec.shape, generator=generator) * 0.1).to(dtype)
        elif dtype == torch.int32:
            tensors[part] = torch.randint(-(1 << 31), 1 << 31, spec.shape, generator=generator).to(dtype)
        else:
            tensors[part] = torch.tensor(declared.shape)
    if not declared.quantized:
        return tensors, tensors["weight"].float()
    if "weight_zero_point" in tensors:  # the bits after the last row are zero
        rows = unpack_zero_points(tensors["weight_zero_point"], declared.num_bits, declared.shape[0])
        tensors["weight_zero_point"] = pack_zero_points(rows, declared.num_bits)
    parts = (tensors.get(p) for p in ("weight_packed", "weight_scale", "weight_zero_point"))
    return tensors, dequantize(*parts, declared.num_bits)


def load(layer, modules, shard_ids):
    """Give every stored tensor to the layer's weight loaders; returns the float32 weights by module."""
    weights = {}
    for seed, (name, declared) in enumerate(modules.items()):
        tensors, weights[name] = stored_tensors(declared, seed)
        for part, tensor in tensors.items():
            parameter = getattr(layer, part)
            shard = shard_ids.get(name)
            arguments = (tensor,) if shard is None else (tensor, shard)
            parameter.weight_loader(parameter, *arguments)
    return weights
