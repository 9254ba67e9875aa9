"""ARK, the CPU kernels of auto-round-lib: 2-8 bits, symmetric and asymmetric.

Its functions take bare pointers and check little: bfloat16 activations crash the process and bfloat16 scales
give garbage. So this file is the only caller, and hands over contiguous float32 activations and scales.

A blob holds codes, float32 scales and, if asymmetric, one byte a zero point; see `blob_bytes`.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from allocator.contract.cpu import cpu_flags, hidden_flags
from allocator.contract.packing import unpack_codes, unpack_zero_points
from allocator.contract.resident import ARK_ROWS, pad
from gamma_vllm.kernels.joined import check_columns, kinds_of, split_kinds, tensors_of
from gamma_vllm.kernels.library import define
from gamma_vllm.shards import Segment

__all__ = ["ArkKernel", "blob_bytes"]

_COMPUTE_VARIABLE = "GAMMA_ARK_COMPUTE"
_COMPUTE_TYPES = ("fp32", "bf16", "int8")
_SCALE_TYPE = "fp32"


_HEADER_BYTES = 128


def blob_bytes(rows: int, columns: int, num_bits: int, group_size: int, symmetric: bool) -> int:
    """Bytes of the blob of a segment `[rows, columns]`: what stays resident of it, on the CPU at hand.

    With R = rows rounded up to 24, on CPUs with AMX to 48:
    `R*columns*num_bits/8 + R*columns/group_size*(4, or 5 with zero points) + 128`. Found by packing thousands of shapes
    with auto-round-lib 0.16.0. It holds for the default, fp32; with AMX the other compute types take more.
    """
    has_amx = "amx_tile" in (*cpu_flags(), *hidden_flags())  # ARK asks the processor, whatever is hidden from us
    padded = pad(rows, ARK_ROWS["ark-amx" if has_amx else "ark"])
    scales = padded * (columns // group_size) * (4 if symmetric else 5)
    return padded * columns * num_bits // 8 + scales + _HEADER_BYTES


def _compute_type() -> str:
    value = os.environ.get(_COMPUTE_VARIABLE, "fp32")
    if value not in _COMPUTE_TYPES:
        raise ValueError(f"{_COMPUTE_VARIABLE}={value!r}: expected one of {', '.join(_COMPUTE_TYPES)}")
    return value


@dataclass(frozen=True)
class ArkKernel:
    """Multiplies packed blobs; see `gamma_vllm.kernels.choose.Kernel`.

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
    error = _self_test()
    return None if error < 0.02 else f"its self-test is off by {error:.3g} (relative)"


def _self_test() -> float:
    """Relative error of one small product against the reference."""
    from gamma_vllm.kernels.torch_reference import TorchKernel

    segment = Segment((0,), 3, 32, False, rows=48, columns=64)
    with torch.device("cpu"):
        tensors = {
            "packed": (torch.arange(48 * 6) * 19088743).to(torch.int32).reshape(48, 6),
            "scale": torch.linspace(0.5, 1.5, 96, dtype=torch.float32).reshape(48, 2),
            "zero_point": (torch.arange(10) * 76354972).to(torch.int32).reshape(5, 2),
        }
        x = torch.linspace(-1, 1, 3 * 64, dtype=torch.float32).reshape(3, 64)
    kernel, reference = ArkKernel(), TorchKernel()
    expected = reference.linear(segment, tensors, x)
    given = kernel.linear(segment, kernel.pack(segment, tensors), x)
    return float((given - expected).norm() / expected.norm())


def _layer(x: Tensor, tensors: list[Tensor], kinds: list[int], compute: str) -> Tensor:
    """`x` `[..., columns]` times each segment (see `joined`), joined along the rows."""
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
