"""Codes to the dense bit stream of `allocator.contract.layout` and back. The one file of the contract with torch.

Writer (quantizers) and reader (the plugin's reference kernel) share it, so the layout is written down once.
"""

import torch
from torch import Tensor

__all__ = ["dequantize", "dequantize_rows", "pack_codes", "pack_zero_points", "unpack_codes", "unpack_zero_points"]


def _check_width(num_bits: int) -> None:
    if not 1 <= num_bits <= 8:
        raise ValueError(f"num_bits must be 1..8, got {num_bits}")


def pack_codes(codes: Tensor, num_bits: int) -> Tensor:
    """Pack unsigned codes `[..., K]` (any integer dtype, values < 2^num_bits, K % 32 == 0) to int32 `[..., K*b/32]`."""
    _check_width(num_bits)
    if codes.shape[-1] % 32:
        raise ValueError(f"the packed dimension must be a multiple of 32, got {codes.shape[-1]}")
    groups = codes.reshape(*codes.shape[:-1], -1, 32)
    words = torch.zeros(*groups.shape[:-1], num_bits, dtype=torch.int64, device=codes.device)
    for position in range(32):
        word, shift = divmod(position * num_bits, 32)
        code = groups[..., position].to(torch.int64)
        words[..., word] |= (code << shift) & 0xFFFFFFFF
        if shift + num_bits > 32:
            words[..., word + 1] |= code >> (32 - shift)
    # Two's complement by hand: a cast of values above 2^31 - 1 to int32 is not defined everywhere.
    words = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return words.to(torch.int32).reshape(*codes.shape[:-1], -1)


def unpack_codes(packed: Tensor, num_bits: int) -> Tensor:
    """Inverse of `pack_codes`: int32 `[..., K*b/32]` to uint8 codes `[..., K]`."""
    _check_width(num_bits)
    if packed.shape[-1] % num_bits:
        raise ValueError(f"{packed.shape[-1]} words are no whole number of 32 codes of {num_bits} bits")
    words = packed.reshape(*packed.shape[:-1], -1, num_bits).to(torch.int64) & 0xFFFFFFFF
    codes = torch.empty(*words.shape[:-1], 32, dtype=torch.uint8, device=packed.device)
    mask = (1 << num_bits) - 1
    for position in range(32):
        word, shift = divmod(position * num_bits, 32)
        code = words[..., word] >> shift
        if shift + num_bits > 32:
            code = code | (words[..., word + 1] << (32 - shift))
        codes[..., position] = (code & mask).to(torch.uint8)
    return codes.reshape(*packed.shape[:-1], -1)


def pack_zero_points(zero_points: Tensor, num_bits: int) -> Tensor:
    """Pack zero points `[N, G]` along N to int32 `[ceil(N*b/32), G]`; the last word is filled up with zeros."""
    rows, groups = zero_points.shape
    padded = torch.zeros(-(-rows // 32) * 32, groups, dtype=zero_points.dtype, device=zero_points.device)
    padded[:rows] = zero_points
    packed = pack_codes(padded.T.contiguous(), num_bits).T
    return packed[: -(-rows * num_bits // 32)].contiguous()


def unpack_zero_points(packed: Tensor, num_bits: int, rows: int) -> Tensor:
    """Inverse of `pack_zero_points`: uint8 `[rows, G]`."""
    words, groups = packed.shape
    padded = torch.zeros(-(-rows // 32) * num_bits, groups, dtype=packed.dtype, device=packed.device)
    padded[:words] = packed
    return unpack_codes(padded.T.contiguous(), num_bits).T[:rows].contiguous()


def dequantize(packed: Tensor, scale: Tensor, zero_point: Tensor | None, num_bits: int) -> Tensor:
    """The float32 weight `[N, K]` of a quantized module: `(code - zero) * scale`, computed in float32.

    packed: int32 `[N, K*b/32]`; scale: `[N, K/g]`; zero_point: packed int32 `[ceil(N*b/32), K/g]`, or None for
    a symmetric module, whose zero is 2^(b-1).
    """
    codes = unpack_codes(packed, num_bits)
    rows, columns = codes.shape
    grouped = codes.to(torch.float32).reshape(rows, scale.shape[1], -1)
    if zero_point is None:
        grouped = grouped - float(1 << (num_bits - 1))
    else:
        grouped = grouped - unpack_zero_points(zero_point, num_bits, rows).to(torch.float32).unsqueeze(-1)
    return (grouped * scale.to(torch.float32).unsqueeze(-1)).reshape(rows, columns)


def dequantize_rows(rows: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, num_bits: int) -> Tensor:
    """Rows `rows` (int64 `[n]`) of what `dequantize` gives for the same tensors: float32 `[n, K]`."""
    codes, scales = unpack_codes(packed[rows], num_bits), scale[rows].to(torch.float32).unsqueeze(-1)
    grouped = codes.to(torch.float32).reshape(*scales.shape[:2], -1)
    if zero_point is None:
        grouped -= float(1 << (num_bits - 1))
    else:
        zeros = unpack_zero_points(zero_point, num_bits, packed.shape[0])[rows]
        grouped -= zeros.to(torch.float32).unsqueeze(-1)
    return (grouped * scales).reshape(len(rows), -1)
