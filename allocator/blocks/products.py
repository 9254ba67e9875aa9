"""Products with a weight in float32, by the fastest library at hand; in bfloat16 where that is enough.

torch multiplies float32 matrices on CPU by MKL, which on processors that are not Intel's keeps to AVX2; oneDNN, which
torch has too, takes AVX-512 there and is twice as fast. Sums are rounded in another order, no more.

Where the processor multiplies bfloat16 that is twice as fast again. It has eight bits, which is too few for states, but
not for the change of a state (an error that is measured to three digits), nor for a gradient, which is kept in bfloat16
from block to block: products of these are taken in it. Other processors do all of it in float32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = [
    "FastProducts",
    "half_products",
    "has_bfloat16",
    "has_faster_changes",
    "linear",
    "linear_of_change",
    "only_float32",
]

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


def linear_of_change(change: Tensor, weight: Tensor) -> Tensor:
    """`linear` to three digits, in float32 or in bfloat16: of a change of inputs or of a gradient, `[..., K]`."""
    if not has_faster_changes(change, weight):
        return linear(change, weight)
    found: Tensor = torch.ops.mkldnn._linear_pointwise(change.bfloat16(), weight.bfloat16(), None, "none", [], "")
    return found


_bfloat16_allowed = ContextVar("bfloat16_allowed", default=True)


@contextmanager
def only_float32() -> Iterator[None]:
    """A context in which all products are in float32, as on a processor that has nothing faster."""
    token = _bfloat16_allowed.set(False)
    try:
        yield
    finally:
        _bfloat16_allowed.reset(token)


def has_faster_changes(change: Tensor, weight: Tensor) -> bool:
    """Whether `linear_of_change` is another function than `linear` here."""
    return _bfloat16_allowed.get() and has_bfloat16(change.device) and _has_onednn(change, weight)


def _has_onednn(inputs: Tensor, weight: Tensor) -> bool:
    return (
        inputs.device.type == "cpu"
        and inputs.dtype == weight.dtype == torch.float32
        and inputs.numel() * weight.shape[0] >= _WORTH_IT
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )


class FastProducts(TorchFunctionMode):
    """A context in which products with weights that take no gradient are those of `linear`, on the way back too: of
    `linear_of_change` there, if three digits are enough."""

    def __init__(self, three_digits: bool = False) -> None:
        super().__init__()
        self._back = linear_of_change if three_digits else linear

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and not args[1].requires_grad:
            return _Linear.apply(self._back, *args)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, back: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.back = back
        return linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return None, ctx.back(gradients[0], weight.T).float(), None, None


def half_products(device: torch.device) -> torch.autocast:
    """A context in which products are bfloat16 where the device is faster with it: for gradients that only weigh."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


def has_bfloat16(device: torch.device) -> bool:
    """Whether it multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
