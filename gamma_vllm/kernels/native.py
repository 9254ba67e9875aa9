"""Our own kernels for CPUs: `native_avx512.cpp` for AVX-512 VBMI and BF16 (AMD from Zen 4, Intel from Sapphire Rapids),
and `native_avx2.cpp` for AVX2, FMA and F16C (AMD from Zen 1, Intel from Haswell).

They read codes and scales as the checkpoint stores them, so nothing is repacked and nothing is larger in memory but the
zero points, one byte each. In decode (gemv) a few activations are multiplied code by code; in prefill (gemm) many, with
weights unpacked a piece at a time: in tiles of AMX where the CPU has them (Intel from Sapphire Rapids), else in
registers. Tiles take three to 32 activations code by code too. With AVX2 codes and activations are multiplied as
integers of 16 bits.

What is needed is compiled on first use with the C++ compiler that is there, into vLLM's cache folder; `gamma warmup`
does it ahead, for images without a compiler.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from allocator.contract.cpu import cpu_flags, why_missing
from allocator.contract.packing import unpack_zero_points
from gamma_vllm.kernels.base import (
    Activation,
    Stack,
    check_columns,
    define,
    kinds_of,
    multiply_in_turn,
    split_kinds,
    tensors_of,
)
from gamma_vllm.kernels.self_test import failed_self_test
from gamma_vllm.memory import empty_weight
from gamma_vllm.shards import Segment

__all__ = ["Isa", "NativeKernel", "build", "library", "usable_isas", "why_not_isa"]

Isa = Literal["avx512", "avx2"]

_FOLDER = Path(__file__).parent
_SOURCES: dict[Isa, str] = {"avx512": "native_avx512.cpp", "avx2": "native_avx2.cpp"}
_NEEDED: dict[Isa, tuple[str, ...]] = {
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512_bf16", "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
}
"""What the CPU must have, as Linux names it, in order of preference; and what the compiler may use."""
_FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp")
_PREFIXES: dict[Isa, str] = {"avx512": "native", "avx2": "native_avx2"}
"""Of the names of operators, which differ so that both libraries can be in a process."""

_BLOCK = 32
"""Operators read so many columns at a time."""
_GEMV_TOKENS = 24
"""Up to so many activations in float16 or float32 are multiplied by gemv, code by code."""
SPACE_WEIGHTS = 1 << 22
"""Weights dequantized at a time for activations in float16 and float32; 16 MiB stay allocated for them."""


def usable_isas() -> tuple[Isa, ...]:
    """The instruction sets that there is a kernel for and that it has passed its self-test with, the best first."""
    return tuple(isa for isa in _NEEDED if why_not_isa(isa) is None)


def _best_isa() -> Isa:
    return next(iter(usable_isas()), "avx2")


@dataclass(frozen=True)
class NativeKernel:
    """Multiplies on CPUs; see `gamma_vllm.kernels.base.Kernel`. Both instruction sets take the same tensors."""

    isa: Isa = field(default_factory=_best_isa)

    name = "native"
    buffers = ()

    @property
    def signature(self) -> str:
        return f"native {self.isa}"

    @property
    def about(self) -> str:
        """What is used of the CPU, and why not more."""
        return self.isa if self.isa == "avx512" else f"{self.isa}: {why_not_isa('avx512')}"

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        """None when one of the instruction sets will do, else what each lacks."""
        if device.type != "cpu":
            return f"it multiplies on CPUs, and the model is on {device}"
        reasons = {isa: why_not_isa(isa) for isa in _NEEDED}
        if None in reasons.values():
            return None
        return "; ".join(f"{isa}: {reason}" for isa, reason in reasons.items())

    def tensor_names(self, segment: Segment) -> tuple[str, ...]:
        return ("packed", "scale") if segment.symmetric else ("packed", "scale", "zero_point")

    def pack(self, segment: Segment, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's own codes and scales; zero points as bytes `[rows, groups]`."""
        kept = {"packed": tensors["packed"].contiguous(), "scale": tensors["scale"].contiguous()}
        if not segment.symmetric:
            zeros = unpack_zero_points(tensors["zero_point"], segment.num_bits, segment.rows)
            kept["zero_point"] = empty_weight("zero_point", zeros.numel(), zeros.dtype).view(zeros.shape).copy_(zeros)
        return kept

    def linear(self, segment: Segment, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        return self.layer([segment], [tensors], x)

    def layer(self, segments: Sequence[Segment], tensors: Sequence[dict[str, Tensor]], x: Tensor) -> Tensor:
        """One operator a layer: products go straight to their place. What is all at 16 bits is torch's, as its columns
        may be no multiple of 32."""
        check_columns(segments, x)
        if not any(segment.quantized for segment in segments):
            return multiply_in_turn(self, segments, tensors, x)
        held, kinds = tensors_of(self, segments, tensors), kinds_of(segments)
        if x.dtype != torch.bfloat16:
            return torch.ops.gamma.native_wide_layer(x.contiguous(), held, kinds, self.isa)
        return self._operator("layer")(x.contiguous(), held, kinds)

    def index_experts(self, stack: Stack) -> tuple[Tensor, Tensor] | None:
        """The segments of all experts as `Entry` of native_experts.h, and where each expert's begin."""
        entries, starts = [], [0]
        for expert, segments in enumerate(stack.segments):
            start = 0
            for number, segment in enumerate(segments):
                if segment.columns % _BLOCK:
                    return None

                def offset(name: str, of: tuple[int, int] = (expert, number)) -> int:
                    return stack.places[*of, name].offset * stack.tensors[name].itemsize

                if segment.quantized:
                    scale_is_bfloat16 = stack.tensors["scale"].dtype == torch.bfloat16
                    zeros = -1 if segment.symmetric else offset("zero_point")
                    held = (scale_is_bfloat16, offset("packed"), offset("scale"), zeros)
                elif stack.tensors["weight"].dtype == torch.bfloat16:
                    held = (False, offset("weight"), 0, -1)
                else:
                    return None
                entries.append((start, segment.rows, segment.group_size or 0, segment.num_bits, *held))
                start += segment.rows
            starts.append(len(entries))
        with torch.device("cpu"):
            return torch.tensor(entries, dtype=torch.int64), torch.tensor(starts, dtype=torch.int64)

    def experts(
        self, w13: Stack, w2: Stack, x: Tensor, ids: Tensor, weights: Tensor, activation: Activation
    ) -> Tensor | None:
        """One operator for each of the two weights, and one parallel region."""
        check_columns(w13.segments[0], x)
        if x.dtype != torch.bfloat16 or w13.index is None or w2.index is None:
            return None
        ids = ids.contiguous()
        up = self._operator("experts_up")(x.contiguous(), ids, _stack_tensors(w13))
        activated = up if activation.silu else activation.apply(up)
        tensors = _stack_tensors(w2)
        return self._operator("experts_down")(activated, ids, weights.contiguous(), tensors, activation.silu)

    def gather_rows(
        self, ids: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, num_bits: int
    ) -> Tensor:
        """What `gamma_vllm.embedding.gather_rows` gives, in bfloat16."""
        return self._operator("gather_rows")(ids.to(torch.int64).contiguous(), packed, scale, zero_point, num_bits)

    def _operator(self, name: str) -> Callable[..., Tensor]:
        return getattr(torch.ops.gamma, f"{_PREFIXES[self.isa]}_{name}")


def _stack_tensors(stack: Stack) -> list[Tensor]:
    """As `class Stack` of native_experts.h takes them."""
    none = stack.index[0]  # any tensor: no segment has one of a kind that is not there
    held = [stack.tensors.get(name, none) for name in ("packed", "scale", "zero_point", "weight")]
    return [*held, *stack.index]


@functools.cache
def why_not_isa(isa: Isa) -> str | None:
    """Why the kernel cannot run with an instruction set: what the CPU, a compiler or its self-test lacks; or None."""
    if (missing := why_missing(_NEEDED[isa])) is not None:
        return missing
    try:
        library(isa)
    except (OSError, RuntimeError) as error:
        return str(error)
    return failed_self_test(NativeKernel(isa), float32=1e-3, bfloat16=1e-2)  # sums of bfloat16 are rounded to it


def build(isa: Isa) -> Path:
    """The compiled library, made now if it is not in the cache. Raises RuntimeError saying what is missing."""
    from vllm import envs

    source = _FOLDER / _SOURCES[isa]
    flags = (*_FLAGS, *(f"-m{flag.replace('_', '')}" for flag in _NEEDED[isa]))
    sources = b"".join(path.read_bytes() for path in (source, *sorted(_FOLDER.glob("native_*.h"))))
    key = hashlib.sha256(sources + " ".join((*flags, torch.__version__)).encode()).hexdigest()[:16]
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
        torch_folder = Path(torch.__file__).parent
        torch_flags = (f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-ltorch_cpu")
        command = [compiler, *flags, str(source), *torch_flags, "-o", temporary]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{compiler} cannot compile {source.name}: {done.stderr.strip()[-500:]}")
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


@functools.cache
def library(isa: Isa) -> ctypes.CDLL:
    """The functions of an instruction set, compiled if need be. Raises RuntimeError and OSError as `build` does."""
    loaded = ctypes.CDLL(str(build(isa)))
    pointer, number = ctypes.c_void_p, ctypes.c_long
    loaded.gamma_gemv.argtypes = [pointer, pointer, number, pointer, number]
    loaded.gamma_dequantize.argtypes = [pointer, pointer]
    if isa == "avx512":
        loaded.gamma_use_amx.argtypes, loaded.gamma_use_amx.restype = [ctypes.c_bool], ctypes.c_bool
        loaded.gamma_use_amx("amx_bf16" in cpu_flags())
    return loaded


def _wide_layer(x: Tensor, tensors: list[Tensor], kinds: list[int], isa: Isa) -> Tensor:
    """What `_fake_layer` says, for activations in float16 and float32."""
    held, segments, total = iter(tensors), [], 0
    for rows, group_size, bits, symmetric in split_kinds(kinds):
        weight = next(held)
        scale = next(held) if bits != 16 else weight
        zeros = next(held) if bits != 16 and not symmetric else weight
        segments.append((weight, scale, zeros, rows, group_size, bits))
        total += rows
    flat = x.reshape(-1, x.shape[-1])
    multiply = _gemv if flat.shape[0] <= _GEMV_TOKENS else _gemm
    return multiply(flat, segments, total, isa).to(x.dtype).view(*x.shape[:-1], total)


_Held = tuple[Tensor, Tensor, Tensor, int, int, int]
"""A segment: weight, scale, zero points (bytes; any other tensor for none), rows, group size, bits."""


def _described(held: _Held, columns: int) -> "array[int]":
    """A segment as `struct Weight` of native_layout.h."""
    weight, scale, zero, rows, group_size, bits = held
    zeros = zero.data_ptr() if zero.dtype == torch.uint8 else 0
    bfloat16 = scale.dtype == torch.bfloat16
    return array("q", (weight.data_ptr(), scale.data_ptr(), zeros, bfloat16, rows, columns, group_size, bits))


def _gemv(x: Tensor, segments: list[_Held], total: int, isa: Isa) -> Tensor:
    """Decode: a few activations `[tokens, columns]`, code by code: `[tokens, total]` in float32."""
    tokens, columns = x.shape
    parts = _as_bfloat16(x, isa)
    output = torch.empty(parts.shape[0], total, dtype=torch.float32)
    start = 0
    for held in segments:
        weight, rows, bits = held[0], held[3], held[5]
        place = output.narrow(1, start, rows)
        if bits == 16:
            place[:tokens].copy_(F.linear(x, weight))
            place[tokens:].zero_()
        else:
            described = _described(held, columns)
            library(isa).gamma_gemv(
                described.buffer_info()[0], parts.data_ptr(), parts.shape[0], place.data_ptr(), total
            )
        start += rows
    return output.view(-1, tokens, total).sum(0) if tokens else output


def _gemm(x: Tensor, segments: list[_Held], total: int, isa: Isa) -> Tensor:
    """Prefill: many activations; the weight dequantized to float32, and one product for as many rows as the
    work space holds. `[tokens, total]` in float32."""
    tokens, columns = x.shape
    x, held_rows = x.float(), max(SPACE_WEIGHTS // columns, 1)
    space = work_space(max(SPACE_WEIGHTS, columns))[: held_rows * columns].view(held_rows, columns)
    output = x.new_empty(tokens, total)
    done = filled = 0
    for weight, scale, zero, rows, group_size, bits in segments:
        first = 0
        while first < rows:
            count = min(rows - first, space.shape[0] - filled)
            place, piece = space[filled : filled + count], slice(first, first + count)
            if bits == 16:
                place.copy_(weight[piece])
            else:
                held = (weight[piece], scale[piece], zero[piece], count, group_size, bits)
                described = _described(held, columns)
                library(isa).gamma_dequantize(described.buffer_info()[0], place.data_ptr())
            first += count
            filled += count
            if filled == space.shape[0] or done + filled == total:
                output.narrow(1, done, filled).copy_(torch.mm(x, space[:filled].t()))
                done, filled = done + filled, 0
    return output


@functools.lru_cache(maxsize=1)
def work_space(weights: int) -> Tensor:
    """For dequantized weights, kept for the next call: fresh pages would cost more than unpacking."""
    return torch.empty(weights, dtype=torch.float32)


def _as_bfloat16(x: Tensor, isa: Isa) -> Tensor:
    """`[tokens, columns]` as a sum of bfloat16 parts, one after the other: `[parts*tokens, columns]`.

    float16 is two parts exactly, float32 three up to its last bit. With AVX2, which rounds activations to 15 bits below
    the largest of their group, a part is rounded so already, and the next one has what that took away.
    """
    parts, rest = [], x.to(torch.float32)
    for _ in range(2 if x.dtype == torch.float16 else 3):
        part = rest.to(torch.bfloat16).to(torch.float32)
        if isa == "avx2":
            lowest = torch.exp2(torch.frexp(rest.abs().amax(-1, keepdim=True)).exponent.float() - 15)
            part = (part / lowest).round_() * lowest
        parts.append(part.to(torch.bfloat16))
        rest = rest - part
    return torch.cat(parts)


def _fake_layer(x: Tensor, tensors: list[Tensor], kinds: list[int]) -> Tensor:
    """By shape, `x` `[..., columns]` times each segment, joined along the rows.

    tensors and kinds: see `tensors_of` and `kinds_of`; tensors as `NativeKernel.pack` gives them.
    """
    return x.new_empty((*x.shape[:-1], sum(kinds[::4])))


def _fake_wide_layer(x: Tensor, tensors: list[Tensor], kinds: list[int], isa: Isa) -> Tensor:
    return _fake_layer(x, tensors, kinds)


_ARGUMENTS = "(Tensor x, Tensor[] tensors, int[] kinds"
_EXPERTS = "(Tensor x, Tensor ids"
for _prefix in _PREFIXES.values():  # the .cpp files have the implementations
    define(f"{_prefix}_layer", f"{_ARGUMENTS}) -> Tensor", None, _fake_layer)
    define(f"{_prefix}_experts_up", f"{_EXPERTS}, Tensor[] tensors) -> Tensor", None, None)
    _schema = f"{_EXPERTS}, Tensor weights, Tensor[] tensors, bool silu) -> Tensor"
    define(f"{_prefix}_experts_down", _schema, None, None)
define("native_wide_layer", f"{_ARGUMENTS}, str isa) -> Tensor", _wide_layer, _fake_wide_layer)
