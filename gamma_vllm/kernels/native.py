"""Our own kernels for CPUs with AVX-512 VBMI and BF16 (AMD from Zen 4, Intel from Sapphire Rapids): `native.cpp`.

They read codes and scales as the checkpoint stores them, so nothing is repacked and nothing is larger in memory but the
zero points, one byte each (`resident_bytes`). Few activations are multiplied code by code; many, as in prefill, with
weights dequantized a piece at a time.

`native.cpp` is compiled on first use with the C++ compiler that is there, into vLLM's cache folder; `gamma warmup`
does it ahead, for images without a compiler.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from allocator.contract.packing import unpack_zero_points
from gamma_vllm.kernels.library import define
from gamma_vllm.shards import Segment

__all__ = ["NativeKernel", "build", "resident_bytes"]

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq",
    "-mavx512vbmi", "-mavx512bf16", "-mfma", "-mf16c",
)  # fmt: skip
_CPU_FLAGS = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512_bf16", "fma", "f16c")

_FEW_TOKENS = 24
"""Up to so many activations multiplying code by code is faster than dequantizing first (measured, Zen 5, one core)."""
_PIECE_WEIGHTS = 1 << 23
"""Weights dequantized at a time."""


def resident_bytes(rows: int, columns: int, num_bits: int, group_size: int, symmetric: bool) -> int:
    """Bytes of a segment after `pack`: `rows*columns*bits/8` codes, two bytes a scale, one byte a zero point."""
    groups = rows * (columns // group_size)
    return rows * columns * num_bits // 8 + groups * (2 if symmetric else 3)


@dataclass(frozen=True)
class NativeKernel:
    """Multiplies on CPUs; see `gamma_vllm.kernels.choose.Kernel`."""

    name = "native"
    signature = "native"
    buffers = ()

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it multiplies on CPUs, and the model is on {device}"
        return _why_not_cpu()

    def tensor_names(self, segment: Segment) -> tuple[str, ...]:
        return ("packed", "scale") if segment.symmetric else ("packed", "scale", "zeros")

    def pack(self, segment: Segment, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's own codes and scales; zero points as bytes `[rows, groups]`."""
        kept = {"packed": tensors["packed"].contiguous(), "scale": tensors["scale"].contiguous()}
        if not segment.symmetric:
            kept["zeros"] = unpack_zero_points(tensors["zero_point"], segment.num_bits, segment.rows)
        return kept

    def linear(self, segment: Segment, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        return self.layer([segment], [tensors], x)

    def layer(self, segments: Sequence[Segment], tensors: Sequence[dict[str, Tensor]], x: Tensor) -> Tensor:
        """One operator a layer: products go straight to their place."""
        empty = next(iter(tensors[0].values())).new_empty(0)
        return torch.ops.gamma.native_layer(
            x,
            [held["packed" if s.quantized else "weight"] for s, held in zip(segments, tensors, strict=True)],
            [held.get("scale", empty) for held in tensors],
            [held.get("zeros", empty) for held in tensors],
            segments[0].columns,
            [s.rows for s in segments],
            [s.group_size or 0 for s in segments],
            [s.num_bits for s in segments],
        )


@functools.cache
def _why_not_cpu() -> str | None:
    missing = [flag for flag in _CPU_FLAGS if flag not in _cpu_flags()]
    if missing:
        return f"this CPU has no {', '.join(missing)}"
    try:
        _library()
    except (OSError, RuntimeError) as error:
        return str(error)
    error = _self_test()
    return None if error < 1e-3 else f"its self-test is off by {error:.3g} (relative)"


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), []))


def build() -> Path:
    """The compiled library, made now if it is not in the cache. Raises RuntimeError saying what is missing."""
    from vllm import envs

    source = _SOURCE.read_bytes()
    key = hashlib.sha256(source + " ".join(_FLAGS).encode()).hexdigest()[:16]
    target = Path(envs.VLLM_CACHE_ROOT) / "gamma" / f"native-{key}.so"
    if target.exists():
        return target
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError(
            f"there is no C++ compiler (g++, clang++, CXX) and no {target}; install one, or run `gamma warmup` where "
            "there is one and bring that folder along"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(descriptor)
    try:
        done = subprocess.run([compiler, *_FLAGS, str(_SOURCE), "-o", temporary], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{compiler} cannot compile {_SOURCE.name}: {done.stderr.strip()[-500:]}")
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build()))
    pointer, number = ctypes.c_void_p, ctypes.c_long
    module = [pointer, pointer, ctypes.c_int, pointer, number, number, number, ctypes.c_int]
    library.gamma_multiply.argtypes = [*module, pointer, number, pointer, number]
    library.gamma_dequantize.argtypes = [*module, pointer, ctypes.c_int]
    return library


def _self_test() -> float:
    """Relative error of one small product against the reference."""
    from gamma_vllm.kernels.torch_reference import TorchKernel

    segment = Segment((0,), 3, 32, False, rows=48, columns=64)
    with torch.device("cpu"):
        tensors = {
            "packed": (torch.arange(48 * 6) * 19088743).to(torch.int32).reshape(48, 6),
            "scale": torch.linspace(0.5, 1.5, 96).to(torch.bfloat16).reshape(48, 2),
            "zero_point": (torch.arange(10) * 76354972).to(torch.int32).reshape(5, 2),
        }
        x = torch.linspace(-1, 1, 3 * 64, dtype=torch.float32).reshape(3, 64)
    kernel, reference = NativeKernel(), TorchKernel()
    expected = reference.linear(segment, tensors, x)
    return float((kernel.linear(segment, kernel.pack(segment, tensors), x) - expected).norm() / expected.norm())


def _layer(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    columns: int,
    rows: list[int],
    group_sizes: list[int],
    num_bits: list[int],
) -> Tensor:
    """`x` `[..., columns]` times each weight (packed, or `[rows, columns]` at 16 bits), joined along the rows."""
    if x.shape[-1] != columns:
        raise ValueError(f"{x.shape[-1]} activations for a weight of {columns} columns")
    flat, total = x.reshape(-1, columns).contiguous(), sum(rows)
    tokens = flat.shape[0]
    few = tokens <= _FEW_TOKENS
    activations = _as_bfloat16(flat) if few else flat
    copies = activations.shape[0] // tokens if tokens and few else 1
    output = torch.empty(activations.shape[0], total, dtype=torch.float32 if few else x.dtype)
    start = 0
    for weight, scale, zero, count, group_size, bits in zip(
        weights, scales, zeros, rows, group_sizes, num_bits, strict=True
    ):
        place = output.narrow(1, start, count)
        start += count
        if bits == 16:
            place[:tokens].copy_(F.linear(flat, weight))
            place[tokens:].zero_()
        elif few:
            _multiply(weight, scale, zero, columns, count, group_size, bits, activations, place)
        else:
            _dequantize_and_multiply(weight, scale, zero, columns, count, group_size, bits, flat, place)
    if copies > 1:
        output = output.view(copies, tokens, total).sum(0)
    return output.to(x.dtype).view(*x.shape[:-1], total)


def _as_bfloat16(x: Tensor) -> Tensor:
    """`[tokens, columns]` as a sum of bfloat16 parts, one after the other: `[parts*tokens, columns]`.

    float16 is two parts exactly, float32 three up to its last bit.
    """
    if x.dtype == torch.bfloat16:
        return x
    parts, rest = [], x.to(torch.float32)
    for _ in range(2 if x.dtype == torch.float16 else 3):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1].to(torch.float32)
    return torch.cat(parts)


def _multiply(
    weight: Tensor,
    scale: Tensor,
    zeros: Tensor,
    columns: int,
    rows: int,
    group_size: int,
    bits: int,
    x: Tensor,
    place: Tensor,
) -> None:
    _library().gamma_multiply(
        weight.data_ptr(), scale.data_ptr(), scale.dtype == torch.bfloat16, zeros.data_ptr() or None,
        rows, columns, group_size, bits, x.data_ptr(), x.shape[0], place.data_ptr(), place.stride(0),
    )  # fmt: skip


def _dequantize_and_multiply(
    weight: Tensor,
    scale: Tensor,
    zeros: Tensor,
    columns: int,
    rows: int,
    group_size: int,
    bits: int,
    x: Tensor,
    place: Tensor,
) -> None:
    """A piece of rows at a time, in the dtype of bfloat16 activations, else in float32."""
    dtype = x.dtype if x.dtype == torch.bfloat16 else torch.float32
    x = x.to(dtype)
    piece = min(rows, max(1, _PIECE_WEIGHTS // columns))
    dense = torch.empty(piece, columns, dtype=dtype)
    library = _library()
    for first in range(0, rows, piece):
        count = min(piece, rows - first)
        library.gamma_dequantize(
            weight[first].data_ptr(), scale[first].data_ptr(), scale.dtype == torch.bfloat16,
            zeros[first].data_ptr() if zeros.numel() else None, count, columns, group_size, bits,
            dense.data_ptr(), dtype == torch.bfloat16,
        )  # fmt: skip
        place.narrow(1, first, count).copy_(F.linear(x, dense[:count]))


def _fake(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    columns: int,
    rows: list[int],
    group_sizes: list[int],
    num_bits: list[int],
) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(rows)))


define(
    "native_layer",
    "(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] zeros, int columns, int[] rows, int[] group_sizes, "
    "int[] num_bits) -> Tensor",
    _layer,
    _fake,
)
