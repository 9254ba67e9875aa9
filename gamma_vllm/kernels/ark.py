"""ARK, the CPU kernels of auto-round-lib: 2-8 bits, symmetric and asymmetric.

Its functions take bare pointers and check little: bfloat16 activations crash the process and bfloat16 scales
give garbage. So this file is the only caller, and hands over contiguous float32 activations and scales.

A blob holds codes, float32 scales and, if asymmetric, one byte a zero point; `segment_tensors` in
`allocator.contract.resident` says how many bytes.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from allocator.contract.layout import ModuleFormat
from allocator.contract.packing import unpack_codes, unpack_zero_points
from allocator.contract.resident import ARK_ROWS, segment_bytes
from gamma_vllm.kernels.base import OneByOne, check_columns, define, kinds_of, split_kinds, tensors_of
from gamma_vllm.kernels.self_test import failed_self_test
from gamma_vllm.shards import Segment

__all__ = ["ArkKernel", "planned_as"]

_COMPUTE_VARIABLE = "GAMMA_ARK_COMPUTE"
_COMPUTE_TYPES = ("fp32", "bf16", "int8")
_SCALE_TYPE = "fp32"


@functools.cache
def planned_as() -> Literal["ark", "ark-amx"]:
    """The `--kernel` of a plan for the CPU at hand. The library looks at the CPU itself, not at `GAMMA_CPU_ISA`, so
    a matrix is packed, and the size of its blob tells."""
    rows, columns = ARK_ROWS["ark"], 32
    module = ModuleFormat(shape=(rows, columns), num_bits=4, group_size=32, symmetric=True)
    segment = Segment((0,), 4, 32, True, rows, columns)
    with torch.device("cpu"):
        tensors = {
            "packed": torch.zeros(rows, 4, dtype=torch.int32),
            "scale": torch.ones(rows, 1, dtype=torch.float32),
        }
    blob = ArkKernel("fp32").pack(segment, tensors)["blob"]
    return "ark" if blob.nbytes == segment_bytes(rows, columns, module, "ark") else "ark-amx"


def _compute_type() -> str:
    value = os.environ.get(_COMPUTE_VARIABLE, "fp32")
    if value not in _COMPUTE_TYPES:
        raise ValueError(f"{_COMPUTE_VARIABLE}={value!r}: expected one of {', '.join(_COMPUTE_TYPES)}")
    return value


@dataclass(frozen=True)
class ArkKernel(OneByOne):
    """Multiplies packed blobs; see `gamma_vllm.kernels.base.Kernel`.

    `compute` is in what ARK multiplies: `fp32`, `bf16`, or `int8`, which also quantizes the activations. It is
    part of the blob, so it is read from the environment once, here.
    """

    compute: str = field(default_factory=_compute_type)

    name = "ark"
    about = ""
    buffers = ()

    @property
    def signature(self) -> str:
        return f"ark {self.compute}"

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it multiplies on CPUs, and the model is on {device}"
        return _why_not_cpu()

    def tensor_names(self, segment: Segment) -> tuple[str, ...]:
        return ("blob",)

    def pack(self, segment: Segment, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """One int8 blob a segment. Its scales are float32, so it is larger than the checkpoint's tensors."""
        import auto_round_kernel

        scale = tensors["scale"].to(torch.float32)
        if segment.symmetric:
            zeros = torch.full_like(scale, 1 << (segment.num_bits - 1), dtype=torch.uint8)
        else:
            zeros = unpack_zero_points(tensors["zero_point"], segment.num_bits, segment.rows)
        blob = auto_round_kernel.repack_quantized_weight(
            _signed(unpack_codes(tensors["packed"], segment.num_bits), segment.num_bits),
            scale.T.contiguous(),
            _signed(zeros, segment.num_bits),
            segment.group_size,
            self.compute,
            f"int{segment.num_bits}",
            _SCALE_TYPE,
            not segment.symmetric,
        )
        return {"blob": blob}

    def linear(self, segment: Segment, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        return self.layer([segment], [tensors], x)

    def layer(self, segments: Sequence[Segment], tensors: Sequence[dict[str, Tensor]], x: Tensor) -> Tensor:
        """One operator a layer: the activations become float32 once, products go straight to their place."""
        check_columns(segments, x)
        return torch.ops.gamma.ark_layer(x, tensors_of(self, segments, tensors), kinds_of(segments), self.compute)


def _signed(codes: Tensor, num_bits: int) -> Tensor:
    """Unsigned codes `[N, K]` to ARK's signed ones `[K, N]`."""
    return (codes.to(torch.int16) - (1 << (num_bits - 1))).to(torch.int8).T.contiguous()


@functools.cache
def _why_not_cpu() -> str | None:
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        return f"it needs AVX2, this CPU has {capability}"
    try:
        import auto_round_kernel
    except ImportError as error:
        return f"auto-round-lib cannot be imported ({error}); install the extra `gamma-vllm[cpu]`"
    if getattr(auto_round_kernel, "cpu_lib", None) is None:
        return "auto-round-lib has no CPU library for this platform"
    return failed_self_test(ArkKernel(), float32=0.02, bfloat16=0.02)


def _layer(x: Tensor, tensors: list[Tensor], kinds: list[int], compute: str) -> Tensor:
    """`x` `[..., columns]` times each segment (see `kinds_of`), joined along the rows."""
    import auto_round_kernel

    columns, total = x.shape[-1], sum(kinds[::4])
    flat = x.reshape(-1, columns).contiguous()
    if not flat.shape[0]:
        return x.new_empty((*x.shape[:-1], total))
    activations, no_bias = flat.to(torch.float32), torch.empty(0)
    output = activations.new_zeros(flat.shape[0], total)  # ARK leaves it alone when a blob is no blob: no garbage then
    start = 0
    for weight, (rows, group_size, bits, symmetric) in zip(tensors, split_kinds(kinds), strict=True):
        place = output.narrow(1, start, rows)  # contiguous for one token, or one segment
        start += rows
        if bits == 16:
            place.copy_(F.linear(flat, weight))
            continue
        product = place if place.is_contiguous() else activations.new_zeros(flat.shape[0], rows)
        auto_round_kernel.woqgemm(
            activations, weight, no_bias, rows, columns, group_size, compute, f"int{bits}", _SCALE_TYPE, not symmetric,
            product,
        )  # fmt: skip
        if product is not place:
            place.copy_(product)
    return output.to(x.dtype).view(*x.shape[:-1], total)


def _fake(x: Tensor, tensors: list[Tensor], kinds: list[int], compute: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(kinds[::4])))


define("ark_layer", "(Tensor x, Tensor[] tensors, int[] kinds, str compute) -> Tensor", _layer, _fake)
