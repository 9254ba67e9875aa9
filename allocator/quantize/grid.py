"""The grid of a group: scale and zero point from the range of its weights, optionally searched for least error."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["fit_grid", "quantize_to_grid", "refine_grid"]


def fit_grid(
    weight: Tensor,
    num_bits: int,
    symmetric: bool,
    dtype: torch.dtype,
    importance: Tensor | None = None,
    clip_ratios: Sequence[float] = (1.0,),
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group.

    weight: float32 `[..., g]`; importance: `[..., g]` or broadcastable, weights of the squared error. Of the
    `clip_ratios` applied to the range, the one of least weighted squared error is taken, group by group.
    Returns (scale, zero), both float32 `[..., 1]`; scale is already rounded to `dtype`, zero is a whole code.
    """
    low = weight.amin(-1, keepdim=True).clamp_max(0)
    high = weight.amax(-1, keepdim=True).clamp_min(0)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for ratio in clip_ratios:
        scale, zero = _grid_of_range(low * ratio, high * ratio, num_bits, symmetric, dtype)
        if len(clip_ratios) == 1:
            return scale, zero
        error = (weight - (quantize_to_grid(weight, scale, zero, num_bits) - zero) * scale).square()
        if importance is not None:
            error = error * importance
        total = error.sum(-1, keepdim=True)
        if best is None:
            best = (total, scale, zero)
        else:
            better = total < best[0]
            best = (
                torch.where(better, total, best[0]),
                torch.where(better, scale, best[1]),
                torch.where(better, zero, best[2]),
            )
    assert best is not None
    return best[1], best[2]


def refine_grid(
    weight: Tensor,
    grid: tuple[Tensor, Tensor],
    num_bits: int,
    symmetric: bool,
    dtype: torch.dtype,
    importance: Tensor,
    rounds: int,
) -> tuple[Tensor, Tensor]:
    """`grid` (scale, zero) of each group, improved in turns: codes for the grid, then the least-squares grid for them.

    Shapes as in `fit_grid`. Of all grids seen, each group keeps the one of least weighted squared error.
    """
    scale, zero = grid
    least, best_scale, best_zero = torch.full_like(scale, torch.inf), scale, zero
    total = importance.expand(weight.shape).sum(-1, keepdim=True)
    for _ in range(rounds + 1):
        codes = quantize_to_grid(weight, scale, zero, num_bits)
        error = ((weight - (codes - zero) * scale).square() * importance).sum(-1, keepdim=True)
        better = error < least
        least, best_scale, best_zero = (
            torch.where(better, error, least),
            torch.where(better, scale, best_scale),
            torch.where(better, zero, best_zero),
        )
        if not symmetric:
            zero = ((importance * (codes - weight / scale)).sum(-1, keepdim=True) / total).round()
            zero = zero.clamp(0, (1 << num_bits) - 1)
        steps = codes - zero
        squares = (importance * steps.square()).sum(-1, keepdim=True)
        scale = (importance * weight * steps).sum(-1, keepdim=True) / squares
        scale = _storable(torch.where(torch.isfinite(scale) & (scale > 0), scale, grid[0]), dtype)
    return best_scale, best_zero


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` as 16 bits hold it, never 0 or infinite."""
    limits = torch.finfo(dtype)
    return scale.clamp(limits.tiny, limits.max).to(dtype).float()


def _grid_of_range(
    low: Tensor, high: Tensor, num_bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    steps = (1 << num_bits) - 1
    scale = torch.maximum(-low, high) * 2 / steps if symmetric else (high - low) / steps
    scale = _storable(scale, dtype)  # first, so that the codes fit the scale that is stored
    if symmetric:
        return scale, torch.full_like(scale, float(1 << (num_bits - 1)))
    return scale, torch.round(-low / scale).clamp(0, steps)


def quantize_to_grid(weight: Tensor, scale: Tensor, zero: Tensor, num_bits: int) -> Tensor:
    """Nearest codes (float32, whole numbers in 0..2^b-1), shape of `weight`."""
    return torch.round(weight / scale + zero).clamp(0, (1 << num_bits) - 1)
