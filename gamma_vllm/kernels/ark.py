"""ARK, the CPU kernels of auto-round-lib: 2-8 bits, symmetric and asymmetric.

Its functions take bare pointers and check little: bfloat16 activations crash the process and bfloat16 scales
give garbage. So this file is the only caller, and hands over contiguous float32 activations and scales.
"""

import functools
import os

import torch
from torch import Tensor

from allocator.contract.packing import unpack_codes, unpack_zero_points
from gamma_vllm.kernels.library import define
from gamma_vllm.shards import Segment

__all__ = ["NAME", "linear", "names", "pack", "signature", "why_not"]

NAME = "ark"

_COMPUTE_VARIABLE = "GAMMA_ARK_COMPUTE"
_COMPUTE_TYPES = ("fp32", "bf16", "int8")
_SCALE_TYPE = "fp32"


def compute_type() -> str:
    """In what ARK multiplies: `fp32` (default), `bf16`, or `int8`, which also quantizes the activations."""
    value = os.environ.get(_COMPUTE_VARIABLE, "fp32")
    if value not in _COMPUTE_TYPES:
        raise ValueError(f"{_COMPUTE_VARIABLE}={value!r}: expected one of {', '.join(_COMPUTE_TYPES)}")
    return value


def signature() -> str:
    return f"{NAME} {compute_type()}"


def why_not(device: torch.device) -> str | None:
    """Why ARK cannot run on `device`, or None."""
    if device.type != "cpu":
        return f"it multiplies on CPUs, and the model is on {device}"
    return _why_not_cpu()


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
    """Relative error of one small asymmetric product against its value in float32."""
    segment = Segment((0,), 3, 32, False, rows=48, columns=64)
    with torch.device("cpu"):
        codes = torch.arange(48 * 64).reshape(48, 64) * 7 % 8
        zeros, scale = (
            torch.full((48, 2), 5),
            torch.linspace(0.5, 1.5, 96, dtype=torch.float32).reshape(48, 2),
        )
        x = torch.linspace(-1, 1, 3 * 64, dtype=torch.float32).reshape(3, 64)
    expected = x @ ((codes - 5) * scale.repeat_interleave(32, dim=1)).T
    blob = _pack(segment, codes.to(torch.uint8), scale, zeros.to(torch.uint8), compute_type())
    given = _linear(x, blob, 48, 32, 3, True, compute_type())
    return float((given - expected).norm() / expected.norm())


def names(segment: Segment) -> tuple[str, ...]:
    return ("blob",)


def pack(segment: Segment, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One int8 blob a segment. Its scales are float32, so it is larger than the checkpoint's tensors."""
    codes = unpack_codes(tensors["packed"], segment.num_bits)
    zeros = None
    if not segment.symmetric:
        zeros = unpack_zero_points(tensors["zero_point"], segment.num_bits, segment.rows)
    return {"blob": _pack(segment, codes, tensors["scale"], zeros, compute_type())}


def _pack(segment: Segment, codes: Tensor, scale: Tensor, zeros: Tensor | None, compute: str) -> Tensor:
    import auto_round_kernel

    if zeros is None:
        zeros = torch.full(scale.shape, 1 << (segment.num_bits - 1), dtype=torch.uint8, device=scale.device)
    return auto_round_kernel.repack_quantized_weight(
        _signed(codes, segment.num_bits),
        scale.to(torch.float32).T.contiguous(),
        _signed(zeros, segment.num_bits),
        segment.group_size,
        compute,
        f"int{segment.num_bits}",
        _SCALE_TYPE,
        not segment.symmetric,
    )


def _signed(codes: Tensor, num_bits: int) -> Tensor:
    """Unsigned codes `[N, K]` to ARK's signed ones `[K, N]`."""
    return (codes.to(torch.int16) - (1 << (num_bits - 1))).to(torch.int8).T.contiguous()


def linear(segment: Segment, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """`x` `[..., columns]` times the segment: `[..., rows]`, in the dtype of `x`, computed in float32."""
    return torch.ops.gamma.ark_linear(
        x,
        tensors["blob"],
        segment.rows,
        segment.group_size,
        segment.num_bits,
        not segment.symmetric,
        compute_type(),
    )


def _linear(
    x: Tensor, blob: Tensor, rows: int, group_size: int, num_bits: int, asymmetric: bool, compute: str
) -> Tensor:
    import auto_round_kernel

    columns = x.shape[-1]
    flat = x.reshape(-1, columns).to(torch.float32).contiguous()
    if not flat.shape[0]:
        return x.new_empty((*x.shape[:-1], rows))
    no_bias = flat.new_empty(0)
    output = auto_round_kernel.woqgemm(
        flat, blob, no_bias, rows, columns, group_size, compute, f"int{num_bits}", _SCALE_TYPE, asymmetric
    )
    return output.to(x.dtype).view(*x.shape[:-1], rows)


def _fake(x: Tensor, blob: Tensor, rows: int, group_size: int, num_bits: int, asymmetric: bool, compute: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


define(
    "ark_linear",
    "(Tensor x, Tensor blob, int rows, int group_size, int num_bits, bool asymmetric, str compute) -> Tensor",
    _linear,
    _fake,
)
