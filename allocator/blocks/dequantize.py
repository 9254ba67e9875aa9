"""Weights of a model that is quantized already, as they are read: rows of one weight at a time, by compressed-tensors.

Scales are taken to float32, products computed there, and rounded once to the 16 bits of the dequantized model.
"""

from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from allocator.contract.errors import InputError
from allocator.contract.safetensors_file import StoredTensor
from allocator.model.quantized_source import DequantizedTensor, Scheme

__all__ = ["dequantized", "dequantized_rows"]

_TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
_EXPONENTS = ("mxfp4-pack-quantized", "mxfp8-quantized")
"""Formats whose scales are powers of two, stored as 8 bits."""


def dequantized(stored: DequantizedTensor) -> Tensor:
    """The whole weight, `[N, K]`, or the stack of all experts', made expert by expert."""
    if len(stored.shape) == 2:
        return dequantized_rows(stored, slice(None))
    whole = torch.empty(stored.shape, dtype=_TORCH_DTYPES[stored.dtype])
    for expert in range(stored.shape[0]):
        matrix = dequantized_rows(stored, slice(None), expert)
        whole[expert] = matrix.T if stored.transposed else matrix
    return whole


def dequantized_rows(stored: DequantizedTensor, rows: slice, expert: int | None = None) -> Tensor:
    """Output rows `rows` of a weight, or of that of one expert in a stack: `[n, K]`, also where the stack has it
    transposed. Only the rows that share scales or words with these are read.

    Raises InputError where compressed-tensors is not installed, or does not know the scheme.
    """
    total = stored.shape[-1] if stored.transposed else stored.shape[-2]
    first, last, step = rows.indices(total)
    height = 32 if stored.scheme.block is None else stored.scheme.block[0]
    start, stop = first // height * height, min(-(-last // height) * height, total)
    parts = {name: _part(name, part, stored, slice(start, stop), expert) for name, part in stored.parts.items()}
    parts["weight_shape"] = torch.tensor([stop - start, stored.shape[-2] if stored.transposed else stored.shape[-1]])
    weight = _decompressed(stored, _padded(parts, stored.scheme))[first - start : last - start : step]
    return weight[:, : int(parts["weight_shape"][1])].to(_TORCH_DTYPES[stored.dtype])


def _part(name: str, part: StoredTensor, stored: DequantizedTensor, rows: slice, expert: int | None) -> Tensor:
    """What of one part belongs to `rows`: codes and scales `[n, ...]`, a scale for all of them as it is."""
    scheme = stored.scheme
    total = stored.shape[-1] if stored.transposed else stored.shape[-2]
    with safe_open(part.path, framework="pt") as file:
        whole = file.get_slice(part.stored_as or part.name)
        shape = tuple(whole.get_shape())
        if expert is not None and shape[:1] == stored.shape[:1]:
            place: tuple[Any, ...] = (expert,)
            shape = shape[1:]
        else:
            place = ()
        if not shape or (shape == (1,) and total > 1) or name == "weight_shape":
            tensor: Tensor = file.get_tensor(part.stored_as or part.name)[place]
        elif shape[0] == total:
            tensor = whole[(*place, rows)]
        elif scheme.block is not None:
            tensor = whole[(*place, slice(rows.start // scheme.block[0], -(-rows.stop // scheme.block[0])))]
        elif name == "weight_zero_point":  # packed along the rows
            bits = scheme.num_bits
            tensor = whole[(*place, slice(rows.start * bits // 32, -(-rows.stop * bits // 32)))]
        else:
            tensor = whole[place] if place else file.get_tensor(part.stored_as or part.name)
    if name == "weight_packed" and tensor.dtype == torch.uint8:
        return tensor.flatten(1)
    if name in ("weight_scale", "weight_global_scale") and scheme.format not in _EXPONENTS:
        tensor = tensor.float() if scheme.format != "nvfp4-pack-quantized" or tensor.dtype.itemsize > 1 else tensor
        return tensor[:, None] if tensor.ndim == 1 and scheme.strategy == "channel" else tensor
    return tensor


def _padded(parts: dict[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """Codes filled up with zeros to whole blocks."""
    if scheme.block is None:
        return parts
    codes, (rows, columns) = parts["weight"], parts["weight_scale"].shape
    full = codes.new_zeros(rows * scheme.block[0], columns * scheme.block[1])
    full[: codes.shape[0], : codes.shape[1]] = codes
    return parts | {"weight": full}


def _decompressed(stored: DequantizedTensor, parts: dict[str, Tensor]) -> Tensor:
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme
    except ImportError:
        raise InputError(
            f"{stored.path}: {stored.name} is quantized, and compressed-tensors, which dequantizes it, is not "
            "installed; pip install 'gamma-vllm[learn]'"
        ) from None
    scheme = stored.scheme
    weights = {
        "num_bits": scheme.num_bits,
        "type": scheme.type,
        "symmetric": scheme.symmetric,
        "strategy": scheme.strategy,
        "group_size": scheme.group_size,
        "block_structure": None if scheme.block is None else list(scheme.block),
    }
    try:
        declared = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights})
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        weight: Tensor = compressor.decompress(parts, declared)["weight"]
    except (ValueError, KeyError, NotImplementedError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{stored.path}: {stored.name} cannot be dequantized ({type(error).__name__}: {reason})"
        ) from None
    return weight.detach()
