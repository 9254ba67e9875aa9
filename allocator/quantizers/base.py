"""What a quantizer is given and what it returns."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from allocator.contract.layout import ModuleFormat
from allocator.contract.packing import dequantize, pack_codes, pack_zero_points

__all__ = ["InputStatistics", "QuantizedModule", "Quantizer"]

_DAMPING = 0.01


@dataclass
class InputStatistics:
    """Second moment of a module's inputs on calibration text: `hessian` = sum of x x^T, float32 `[K, K]`."""

    hessian: Tensor
    tokens: int

    @cached_property
    def inverse_cholesky(self) -> Tensor:
        """Upper Cholesky factor of the damped inverse Hessian (Frantar et al. 2022, GPTQ, section 3.3), `[K, K]`.

        Damping is 1 % of the mean diagonal, raised tenfold until the factorisation succeeds.
        """
        hessian = self.hessian.double() / max(self.tokens, 1)
        diagonal = torch.diagonal(hessian)
        mean = diagonal.mean().clamp_min(1e-30)
        dead = torch.where(diagonal == 0, mean, torch.zeros_like(diagonal))
        damping = _DAMPING
        while True:
            damped = hessian + torch.diag(dead + damping * mean)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                break
            damping *= 10
        inverse = torch.cholesky_inverse(factor)
        upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
        return upper.float()


@dataclass(frozen=True)
class QuantizedModule:
    """codes: uint8 `[N, K]`; scale: 16-bit float `[N, K/g]`; zero_point: uint8 `[N, K/g]`, None when symmetric."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def packed(self, num_bits: int) -> dict[str, Tensor]:
        """The tensors of `allocator.contract.layout`, keyed by their last name part."""
        tensors = {
            "weight_packed": pack_codes(self.codes, num_bits),
            "weight_scale": self.scale.contiguous(),
            "weight_shape": torch.tensor(self.codes.shape, dtype=torch.int64),
        }
        if self.zero_point is not None:
            tensors["weight_zero_point"] = pack_zero_points(self.zero_point, num_bits)
        return tensors

    def dequantized(self, num_bits: int) -> Tensor:
        """Float32 weight `[N, K]`, exactly as a server computes it from the packed tensors."""
        tensors = self.packed(num_bits)
        return dequantize(tensors["weight_packed"], self.scale, tensors.get("weight_zero_point"), num_bits)


class Quantizer(Protocol):
    """Turns one weight into one candidate. Third parties register theirs under the entry point `gamma.quantizers`."""

    name: str
    needs_statistics: bool

    def quantize(
        self, weight: Tensor, module: ModuleFormat, dtype: torch.dtype, statistics: InputStatistics | None
    ) -> QuantizedModule:
        """Quantize float32 `weight` `[N, K]` to `module` (below 16 bits); scales are stored in `dtype`."""
        ...
