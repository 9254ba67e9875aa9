"""Round to nearest on a grid searched for the least error of the module's output, inputs taken as independent.

What AWQ (Lin et al. 2023) knows of the activations, their mean squares by channel, weighs the squared error of each
weight; what HQQ (Badri and Shaji 2023) does, solving for the grid and the codes in turn, finds the minimum. AWQ itself
scales channels and folds the inverse into the preceding norm: that would change tensors outside the module, which a
checkpoint keeps bit for bit, and tie the widths of all modules behind one norm together.
"""

import torch
from torch import Tensor

from allocator.contract.layout import ModuleFormat
from allocator.quantize.grid import fit_grid, quantize_to_grid, refine_grid
from allocator.quantize.quantizer import InputStatistics, QuantizedModule, Statistics, row_stripes

__all__ = ["MeanSquaredError"]

_CLIP_RATIOS = tuple(1 - 0.05 * i for i in range(13))
_ROUNDS = 8


class MeanSquaredError:
    """`mse`: needs the mean squares of the module's inputs, and no Hessian."""

    name = "mse"
    statistics: Statistics = "diagonal"

    def quantize(
        self, weight: Tensor, module: ModuleFormat, dtype: torch.dtype, statistics: InputStatistics | None
    ) -> QuantizedModule:
        if statistics is None:
            raise ValueError("mse needs the statistics of the module's inputs")
        moments = statistics.moments
        # Never quite zero, so that channels that were not seen still get their nearest codes.
        importance = moments + 1e-3 * moments.mean() + torch.finfo(torch.float32).tiny
        stripes = [_quantize_rows(weight[rows], module, dtype, importance) for rows in row_stripes(*module.shape)]
        return QuantizedModule.joined(stripes)


def _quantize_rows(weight: Tensor, module: ModuleFormat, dtype: torch.dtype, importance: Tensor) -> QuantizedModule:
    assert module.group_size is not None
    rows, columns = weight.shape
    group, num_bits, symmetric = module.group_size, module.num_bits, bool(module.symmetric)
    grouped = weight.reshape(rows, columns // group, group)
    weights = importance.reshape(1, columns // group, group)
    grid = fit_grid(grouped, num_bits, symmetric, dtype, weights, _CLIP_RATIOS)
    scale, zero = refine_grid(grouped, grid, num_bits, symmetric, dtype, weights, _ROUNDS)
    codes = quantize_to_grid(grouped, scale, zero, num_bits)
    return QuantizedModule(
        codes.to(torch.uint8).reshape(rows, columns),
        scale.squeeze(-1).to(dtype),
        None if symmetric else zero.squeeze(-1).to(torch.uint8),
    )
