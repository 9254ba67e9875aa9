"""Checkpoints of other programs with different widths inside a fused layer: `vllm serve DIR --quantization gamma`.

Stock vLLM refuses them or fails on an assertion. compressed-tensors (pack-quantized) and auto-round / GPTQ store the
same codes, scales and zero points in another order; on their way into the model the tensors are put into ours. Which
module has how many bits is what the declaration says, checked against the shapes of its tensors.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from allocator.contract.checkpoint import CheckpointConfig
from allocator.contract.digest import digest_json
from allocator.contract.documents import explain
from allocator.contract.errors import ContractError
from allocator.contract.layout import ModuleFormat
from allocator.contract.packing import pack_codes, pack_zero_points, unpack_zero_points
from allocator.contract.safetensors_file import StoredTensor, read_folder_headers

__all__ = ["OtherFormat", "in_our_order", "is_convertible", "read_other_format"]

COMPRESSED_TENSORS = "compressed-tensors"
_GPTQ_LIKE = ("auto-round", "gptq", "auto_gptq")

Packing = Literal["dense", "padded", "gptq", "gptq minus one"]
"""dense: as ours. padded: 32//bits codes a word, the rest of the word empty. gptq: transposed; "minus one": zero points
are stored less one."""


@dataclass(frozen=True)
class OtherFormat:
    """A checkpoint of another program: what it declares in our terms, and how its quantized modules are packed."""

    method: str
    checkpoint: CheckpointConfig
    packings: Mapping[str, Packing]


def is_convertible(quantization: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is of a method that can be served as if it were gamma's."""
    return quantization.get("quant_method") in (COMPRESSED_TENSORS, *_GPTQ_LIKE)


def read_other_format(folder: Path, quantization: Mapping[str, Any]) -> OtherFormat:
    """Raises ContractError naming the module that cannot be served, and why."""
    if not folder.is_dir():
        raise ContractError(
            f"{folder}: --quantization gamma reads the tensors of other formats' checkpoints before it serves them; "
            "download the model and give its folder"
        )
    method = str(quantization["quant_method"])
    stored = read_folder_headers(folder)
    read = _compressed_tensors if method == COMPRESSED_TENSORS else _gptq
    found = dict(read(quantization, stored))
    if not found:
        raise ContractError(f"{folder}: no module of its {method} declaration has packed tensors")
    modules = {name: module for name, (module, _) in found.items()}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        if part == "weight" and len(tensor.shape) == 2:
            modules[module] = _format(module, {"shape": tensor.shape, "num_bits": 16})
    scale = stored.get(f"{next(iter(found))}.weight_scale") or stored[f"{next(iter(found))}.scales"]
    checkpoint = CheckpointConfig(
        model_digest=digest_json({name: [t.dtype, list(t.shape)] for name, t in stored.items()}),
        manifest_digest=digest_json(json.loads(json.dumps(quantization, default=str))),
        dtype="F16" if scale.dtype == "F16" else "BF16",
        modules=modules,
    )
    return OtherFormat(method, checkpoint, {name: packing for name, (_, packing) in found.items()})


def _compressed_tensors(
    quantization: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, tuple[ModuleFormat, Packing]]]:
    groups = list((quantization.get("config_groups") or {}).values())
    for name, packed in _modules_with(stored, "weight_packed"):
        group = _group_of(name, groups)
        weights = group.get("weights") or {}
        stored_as = group.get("format") or quantization.get("format")
        if stored_as != "pack-quantized" or weights.get("type", "int") != "int" or group.get("input_activations"):
            raise ContractError(f"{name}: only pack-quantized integer weights are served, this is {stored_as}")
        if f"{name}.weight_g_idx" in stored:
            raise ContractError(f"{name}: weights in activation order cannot be served")
        bits, group_size = weights.get("num_bits"), weights.get("group_size")
        columns = stored[f"{name}.weight_scale"].shape[1] * (group_size or 0)
        module = _format(
            name,
            {
                "shape": (packed.shape[0], columns),
                "num_bits": bits,
                "group_size": group_size,
                "symmetric": bool(weights.get("symmetric", True)),
            },
        )
        bits = module.num_bits
        words = {-(-columns // (32 // bits)): "padded", columns * bits // 32: "dense"}
        packing = words.get(packed.shape[1])
        if packing is None:
            raise ContractError(
                f"{name}: {bits} bits at {columns} columns are {' or '.join(map(str, words))} words a row, "
                f"weight_packed has {packed.shape[1]}"
            )
        yield name, (module, packing)  # type: ignore[misc]


def _group_of(name: str, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The config group of a module: by its name, by a pattern, or as one of a class of modules."""
    ways: tuple[Callable[[str], bool], ...] = (
        lambda target: target == name,
        lambda target: target.startswith("re:") and re.match(target[3:], name) is not None,
        lambda target: target.isidentifier(),
    )
    for fits in ways:
        for group in groups:
            if any(fits(target) for target in group.get("targets", [])):
                return group
    raise ContractError(f"{name}: it has packed tensors, but no config group of the declaration is about it")


def _gptq(
    quantization: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, tuple[ModuleFormat, Packing]]]:
    written_as = str(quantization.get("packing_format") or quantization.get("checkpoint_format") or "gptq")
    if "awq" in written_as:
        raise ContractError(f"packing_format {written_as} is not served; GPTQ's order is (auto_round, auto_gptq, gptq)")
    # GPTQ and auto_round:auto_gptq store zero points less one; gptq_v2 and auto_round's own format do not.
    as_they_are = written_as in ("gptq_v2", "auto_round", "auto_round:gptqmodel")
    packing: Packing = "gptq" if as_they_are else "gptq minus one"
    for name, packed in _modules_with(stored, "qweight"):
        bits = _settings_of(name, quantization).get("bits")
        if not isinstance(bits, int) or not 2 <= bits <= 8 or packed.shape[0] * 32 % bits:
            raise ContractError(f"{name}: {bits} bits do not fit {packed.shape[0]} rows of qweight")
        columns, groups = packed.shape[0] * 32 // bits, stored[f"{name}.scales"].shape[0]
        shape = {"shape": (packed.shape[1], columns), "num_bits": bits, "group_size": columns // groups}
        yield name, (_format(name, shape | {"symmetric": False}), packing)


def _settings_of(name: str, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """auto-round's `extra_config` and GPTQModel's `dynamic`, by name or pattern, over the model's own settings."""
    settings = dict(quantization)
    for key, own in {**(quantization.get("dynamic") or {}), **(quantization.get("extra_config") or {})}.items():
        pattern = key.removeprefix("+:")
        if isinstance(own, dict) and (key == name or (not key.startswith("-:") and _matches(pattern, name))):
            settings |= own
    return settings


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None or re.match(pattern + "$", name) is not None
    except re.error:
        return False


def _modules_with(stored: Mapping[str, StoredTensor], part: str) -> Iterator[tuple[str, StoredTensor]]:
    for name, tensor in stored.items():
        if name.endswith(f".{part}"):
            yield name.removesuffix(f".{part}"), tensor


def _format(name: str, values: dict[str, Any]) -> ModuleFormat:
    try:
        return ModuleFormat.model_validate(values)
    except ValidationError as error:
        raise ContractError(f"{name}: {explain(error)}") from None


def in_our_order(other_format: OtherFormat, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The stream of a checkpoint of ours, given that of the other program."""
    for name, tensor in weights:
        module_name, _, part = name.rpartition(".")
        packing = other_format.packings.get(module_name)
        if packing is None or packing == "dense":
            yield name, tensor
            continue
        module = other_format.checkpoint.modules[module_name]
        parts = _padded(module, part, tensor) if packing == "padded" else _transposed(module, part, tensor, packing)
        yield from ((f"{module_name}.{ours}", value) for ours, value in parts.items())


def _padded(module: ModuleFormat, part: str, tensor: Tensor) -> dict[str, Tensor]:
    bits, (rows, columns) = module.num_bits, module.shape
    if part == "weight_packed":
        return {part: pack_codes(_unpack_padded(tensor, bits)[:, :columns], bits)}
    if part == "weight_zero_point":
        return {part: pack_zero_points(_unpack_padded(tensor.T, bits)[:, :rows].T.contiguous(), bits)}
    return {part: tensor}


def _unpack_padded(packed: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)


def _transposed(module: ModuleFormat, part: str, tensor: Tensor, packing: Packing) -> dict[str, Tensor]:
    bits, (rows, columns) = module.num_bits, module.shape
    if part == "qweight":
        return {"weight_packed": tensor.T.contiguous(), "weight_shape": torch.tensor([rows, columns])}
    if part == "scales":
        return {"weight_scale": tensor.T.contiguous()}
    if part == "qzeros":
        zeros = unpack_zero_points(tensor.T.contiguous(), bits, rows)
        if packing == "gptq minus one":
            zeros = (zeros.to(torch.int16) + 1) & ((1 << bits) - 1)
        return {"weight_zero_point": pack_zero_points(zeros.to(torch.uint8), bits)}
    if part == "g_idx":
        if not torch.equal(tensor.to(torch.int64), torch.arange(columns) // (module.group_size or 1)):
            raise ContractError("g_idx: weights in activation order cannot be served")
        return {}
    return {part: tensor}
