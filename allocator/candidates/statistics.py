"""Second moments of the inputs of a block's modules, summed over calibration text in float64.

Sums in float64 that are then rounded to float32 do not depend on the order of the batches (but for a last bit in
about one of 10^8 elements), so any number of processes gives the same candidates.
"""

import torch
from torch import Tensor

from allocator.quantizers.base import InputStatistics, Statistics
from allocator.running.team import Team

__all__ = ["MomentSums"]

_CHUNK = 2048


class MomentSums:
    """Sums of x x^T (or only of its diagonal) over inputs x of K features.

    Of the matrix only the upper triangle is summed, in stripes of `_CHUNK` rows: products in float32, sums in float64.
    """

    def __init__(self, features: int, kind: Statistics, device: torch.device) -> None:
        shape = (features, features) if kind == "hessian" else (features,)
        self._sum = torch.zeros(shape, dtype=torch.float64, device=device)
        self._tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs `[..., K]`."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self._tokens += rows.shape[0]
        if self._sum.dim() == 1:
            self._sum += rows.double().square().sum(0)
            return
        for start in range(0, rows.shape[1], _CHUNK):
            stripe = rows[:, start : start + _CHUNK]
            self._sum[start : start + _CHUNK, start:] += stripe.T @ rows[:, start:]

    def finish(self, team: Team) -> InputStatistics:
        """The statistics over the inputs of all processes. Once: the sums are let go."""
        tokens = torch.tensor(self._tokens, dtype=torch.float64, device=self._sum.device)
        team.add_up(tokens)
        team.add_up(self._sum)
        if self._sum.dim() == 1:
            return InputStatistics(tokens=int(tokens), hessian=None, diagonal=self._sum.float())
        hessian = torch.empty(self._sum.shape, dtype=torch.float32, device=self._sum.device)
        for start in range(0, hessian.shape[0], _CHUNK):
            end = start + _CHUNK
            hessian[start:end, end:] = self._sum[start:end, end:]
            hessian[end:, start:end] = hessian[start:end, end:].T
            square = self._sum[start:end, start:end].float()
            hessian[start:end, start:end] = square.triu() + square.triu(1).T
        self._sum = self._sum.new_empty(0)  # its memory is needed for the factorisation
        return InputStatistics(tokens=int(tokens), hessian=hessian)
