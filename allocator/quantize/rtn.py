"""Round to nearest: the grid spans each group's range, every weight takes the nearest code."""

import torch
from torch import Tensor

from allocator.contract.layout import ModuleFormat
from allocator.quantize.grid import fit_grid, quantize_to_grid
from allocator.quantize.quantizer import InputStatistics, QuantizedModule, Statistics, row_stripes

__all__ = ["RoundToNearest"]


class RoundToNearest:
    """`rtn`: needs no calibration text."""

    name = "rtn"
    statistics: Statistics = "none"

    def quantize(
        self,
        weight: Tensor,
        module: ModuleFormat,
        dtype: torch.dtype,
        statistics: InputStatistics | None = None,
    ) -> QuantizedModule:
        assert module.group_size is not None
        assert module.symmetric is not None
        stripes = [_quantize_rows(weight[rows], module, dtype) for rows in row_stripes(*module.shape)]
        return QuantizedModule.joined(stripes)


def _quantize_rows(weight: Tensor, module: ModuleFormat, dtype: torch.dtype) -> QuantizedModule:
    assert module.group_size is not None
    rows, columns = weight.shape
    symmetric = bool(module.symmetric)
    grouped = weight.reshape(rows, columns // module.group_size, module.group_size)
    scale, zero = fit_grid(grouped, module.num_bits, symmetric, dtype)
    codes = quantize_to_grid(grouped, scale, zero, module.num_bits)
    return QuantizedModule(
        codes.to(torch.uint8).reshape(rows, columns),
        scale.squeeze(-1).to(dtype),
        None if symmetric else zero.squeeze(-1).to(torch.uint8),
    )
