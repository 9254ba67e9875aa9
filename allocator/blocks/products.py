"""Products with a weight in float32, by the fastest library at hand; in bfloat16 where that is enough.

torch multiplies float32 matrices on CPU by MKL, which on processors that are not Intel's keeps to AVX2; oneDNN, which
torch has too, takes AVX-512 there and is twice as fast. Sums are rounded in another order, no more.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["FastProducts", "half_products", "has_bfloat16", "linear"]

_WORTH_IT = 1 << 16
"""Multiplications below which the way to oneDNN costs more than it saves."""


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: inputs `[..., K]`, weight `[N, K]`, bias `[N]` to `[..., N]`. Without a gradient of its own."""
    if not _has_onednn(inputs, weight):
        return F.linear(inputs, weight, bias)
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        weight = weight.contiguous()  # oneDNN has no fast kernel for rows with gaps between them
    found: Tensor = torch.ops.mkldnn._linear_pointwise(inputs.contiguous(), weight, bias, "none", [], "")
    return found


def _has_onednn(inputs: Tensor, weight: Tensor) -> bool:
    return (
        inputs.device.type == "cpu"
        and inputs.dtype == weight.dtype == torch.float32
        and inputs.numel() * weight.shape[0] >= _WORTH_IT
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )


class FastProducts(TorchFunctionMode):
    """A context in which products with weights that take no gradient are those of `linear`, on the way back too."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and not args[1].requires_grad:
            return _Linear.apply(*args)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(weight)
        return linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return linear(gradients[0], weight.T), None, None


def half_products(device: torch.device) -> torch.autocast:
    """A context in which products are bfloat16 where the device is faster with it: for gradients that only weigh."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


def has_bfloat16(device: torch.device) -> bool:
    """Whether it multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())
