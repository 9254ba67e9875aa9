"""GPTQ (Frantar et al. 2022): columns in order, each one's rounding error is made up for by those that follow.

Activation order is off, so that groups stay contiguous and any kernel can serve the result.
"""

import torch
from torch import Tensor

from allocator.contract.errors import InputError
from allocator.contract.layout import ModuleFormat
from allocator.quantize.grid import fit_grid, quantize_to_grid
from allocator.quantize.ldl import LdlFactor, factorize
from allocator.quantize.quantizer import InputStatistics, QuantizedModule, Statistics, row_stripes

__all__ = ["CLIP_RATIOS", "Gptq"]

CLIP_RATIOS = tuple(1 - 0.05 * i for i in range(11))


class Gptq:
    """`gptq`: needs the Hessian of the module's inputs; each group's grid is searched for least weighted error.

    damping: share of the mean diagonal that is added to the Hessian's diagonal.
    """

    name = "gptq"
    statistics: Statistics = "hessian"

    def __init__(self, damping: float = 0.01) -> None:
        if not 0 < damping < 10:
            raise InputError(f"gptq: damping {damping} must be above 0 and below 10; 0.01 is usual")
        self.damping = damping

    def quantize(
        self, weight: Tensor, module: ModuleFormat, dtype: torch.dtype, statistics: InputStatistics | None
    ) -> QuantizedModule:
        assert module.group_size is not None
        assert module.symmetric is not None
        if statistics is None:
            raise ValueError("gptq needs the statistics of the module's inputs")
        ldl = factorize(statistics, self.damping)
        stripes = [_quantize_rows(weight[rows], module, dtype, ldl) for rows in row_stripes(*module.shape)]
        return QuantizedModule.joined(stripes)


def _quantize_rows(weight: Tensor, module: ModuleFormat, dtype: torch.dtype, ldl: LdlFactor) -> QuantizedModule:
    assert module.group_size is not None
    rows, columns = weight.shape
    group, num_bits, symmetric = module.group_size, module.num_bits, bool(module.symmetric)
    factor, importance = ldl.factor, ldl.pivots
    errors = torch.zeros(rows, columns, device=weight.device)  # weight - its quantized value
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, columns // group, device=weight.device)
    zeros = torch.empty_like(scales)
    for start in range(0, columns, group):
        end = start + group
        block = weight[:, start:end] + errors[:, :start] @ factor[:start, start:end]
        scale, zero = fit_grid(block, num_bits, symmetric, dtype, importance[start:end], CLIP_RATIOS)
        scales[:, start // group], zeros[:, start // group] = scale.squeeze(1), zero.squeeze(1)
        # Transposed, so that each column lies in one piece: [g, N].
        targets, source = block.T.contiguous(), weight[:, start:end].T.contiguous()
        scale, zero = scale.squeeze(1), zero.squeeze(1)
        for j in range(group):
            code = quantize_to_grid(targets[j], scale, zero, num_bits)
            error = source[j] - (code - zero) * scale
            targets[j + 1 :] += factor[start + j, start + j + 1 : end, None] * error
            source[j] = error
            targets[j] = code
        codes[:, start:end] = targets.T.to(torch.uint8)
        errors[:, start:end] = source.T
    return QuantizedModule(codes, scales.to(dtype), None if symmetric else zeros.to(torch.uint8))
