"""GPTQ (Frantar et al. 2022): columns in order, each one's rounding error is made up for by those that follow.

Activation order is off, so that groups stay contiguous and any kernel can serve the result.
"""

import torch
from torch import Tensor

from allocator.contract.layout import ModuleFormat
from allocator.quantizers.base import InputStatistics, QuantizedModule
from allocator.quantizers.grid import fit_grid, quantize_to_grid

__all__ = ["Gptq"]

_CLIP_RATIOS = tuple(1 - 0.05 * i for i in range(11))


class Gptq:
    """`gptq`: needs the Hessian of the module's inputs; each group's grid is searched for least weighted error."""

    name = "gptq"
    needs_statistics = True

    def quantize(
        self, weight: Tensor, module: ModuleFormat, dtype: torch.dtype, statistics: InputStatistics | None
    ) -> QuantizedModule:
        assert module.group_size is not None
        assert module.symmetric is not None
        if statistics is None:
            raise ValueError("gptq needs the statistics of the module's inputs")
        rows, columns = module.shape
        group, num_bits = module.group_size, module.num_bits
        factor = statistics.inverse_cholesky
        # [K]: weight of a rounding error in column j once the later columns have made up for what they can.
        importance = torch.diagonal(factor).pow(-2)

        rest = weight.clone()
        codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
        scales = torch.empty(rows, columns // group, device=weight.device)
        zeros = torch.empty_like(scales)
        for start in range(0, columns, group):
            end = start + group
            block = rest[:, start:end]
            scale, zero = fit_grid(block, num_bits, module.symmetric, dtype, importance[start:end], _CLIP_RATIOS)
            errors = torch.empty_like(block)
            for j in range(group):
                column = block[:, j : j + 1]
                code = quantize_to_grid(column, scale, zero, num_bits)
                codes[:, start + j] = code.squeeze(1).to(torch.uint8)
                error = (column - (code - zero) * scale) / factor[start + j, start + j]
                block[:, j:] -= error * factor[start + j, start + j : end]
                errors[:, j] = error.squeeze(1)
            rest[:, end:] -= errors @ factor[start:end, end:]
            scales[:, start // group] = scale.squeeze(1)
            zeros[:, start // group] = zero.squeeze(1)
        return QuantizedModule(codes, scales.to(dtype), None if module.symmetric else zeros.to(torch.uint8))
