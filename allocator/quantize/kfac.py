"""Rounding against what follows too: GPTQ's feedback from column to column, and the like from row to row.

An error E of a weight costs tr(F E H E^T) / 2 nats a token, H being the second moments of the module's inputs and F
those of the gradients of the model's predictions at its outputs: the Fisher matrix, Kronecker-factored (K-FAC, Martens
and Grosse 2015). GPTQ knows H and takes every row for itself; with F, rows make up for each other's errors (YAQA, Tseng
et al. 2025). Rows go in blocks, each rounded as GPTQ does at its weight and what the rows before ask of it; then again,
given all other rows.

Candidates are made one module at a time beside the original's others, so that each is good whatever width those have.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from allocator.contract.errors import InputError
from allocator.contract.layout import ModuleFormat
from allocator.quantize.gptq import CLIP_RATIOS, Gptq
from allocator.quantize.grid import fit_grid, quantize_to_grid
from allocator.quantize.ldl import factorize
from allocator.quantize.quantizer import InputStatistics, QuantizedModule, Statistics

__all__ = ["Kfac"]

_ROWS = 8
"""Of a block: they make up for other rows' errors and not for each other's, so that they are the rows of a module that
are far from one another."""
_TILES = 64
"""Blocks of rows by groups of columns that are rounded at once."""


class Kfac:
    """`kfac`: needs the second moments of a module's inputs and of gradients at its outputs; without the latter, and
    for wide candidates, it is gptq.

    damping: share of the mean diagonal that is added to either matrix; passes: over the rows after the first;
    up_to_bits: wider candidates are gptq's.
    """

    name = "kfac"
    statistics: Statistics = "kronecker"

    def __init__(self, damping: float = 0.03, passes: float = 3, up_to_bits: float = 4) -> None:
        for key, value, least in (("passes", passes, 0), ("up_to_bits", up_to_bits, 1)):
            if value < least or value != int(value):
                raise InputError(f"{self.name}: {key} {value:g} must be a whole number from {least} on")
        self.passes, self.up_to_bits = int(passes), int(up_to_bits)
        self._gptq = Gptq(damping)

    def quantize(
        self, weight: Tensor, module: ModuleFormat, dtype: torch.dtype, statistics: InputStatistics | None
    ) -> QuantizedModule:
        if statistics is None or not statistics.output_moments or module.num_bits > self.up_to_bits:
            return self._gptq.quantize(weight, module, dtype, statistics)
        inputs = factorize(statistics, self._gptq.damping)
        (moments,) = statistics.output_moments
        rounding = _Rounding(weight, module, dtype, inputs.factor, inputs.pivots)
        return rounding.run(self._damped(moments), self.passes)

    def _damped(self, moments: Tensor) -> Tensor:
        """Positive definite, also where no gradient came."""
        mean = torch.diagonal(moments).double().mean().clamp_min(1e-30).float()
        return moments + self._gptq.damping * mean * torch.eye(moments.shape[0], device=moments.device)


@dataclass(frozen=True)
class _Rounding:
    """weight: float32 `[N, K]`; factor, pivots: of the inputs (see `ldl`)."""

    weight: Tensor
    module: ModuleFormat
    dtype: torch.dtype
    factor: Tensor
    pivots: Tensor

    def run(self, fisher: Tensor, passes: int) -> QuantizedModule:
        """fisher: `[N, N]`. The best of all passes by what it costs."""
        rows = self.weight.shape[0]
        size = next(size for size in range(_ROWS, 0, -1) if rows % size == 0)
        order = torch.arange(rows, device=fisher.device).view(size, -1).T.reshape(-1)
        back = order.argsort()
        ordered = _Rounding(self.weight[order], self.module, self.dtype, self.factor, self.pivots)
        fisher = fisher[order][:, order]
        errors = torch.zeros_like(self.weight)
        best: QuantizedModule | None = None
        least = torch.inf
        for number in range(passes + 1):
            response = _to_rows_before(fisher, size) if number == 0 else _to_all_rows(fisher, size)
            found = ordered._pass(response, errors, size)
            cost = ordered._cost(fisher, errors)
            if best is None or cost < least:
                best, least = found, cost
        assert best is not None
        zeros = None if best.zero_point is None else best.zero_point[back]
        return QuantizedModule(best.codes[back], best.scale[back], zeros)

    def _cost(self, fisher: Tensor, errors: Tensor) -> float:
        """tr(F E H E^T), H by its factors."""
        at_pivots = (errors @ self._unit_upper()) * self.pivots.sqrt()
        return float((fisher @ at_pivots).mul_(at_pivots).sum())

    def _unit_upper(self) -> Tensor:
        upper = self.factor.triu(1)
        torch.diagonal(upper).fill_(1)
        return upper

    def _pass(self, response: Tensor, errors: Tensor, size: int) -> QuantizedModule:
        """Round all rows, and put weight less quantized weight into `errors`, `[N, K]`, which has those of before.

        response: `[N, N]`, what a row adds to its weight of the errors of others. A tile, a block of rows by a group of
        columns, waits for the rows before it and the columns before it: tiles of one diagonal are rounded together.
        """
        group, (rows, columns) = int(self.module.group_size or 0), self.weight.shape
        blocks, groups = rows // size, columns // group
        codes = torch.empty(rows, columns, dtype=torch.uint8, device=errors.device)
        scales = torch.empty(rows, groups, device=errors.device)
        zeros = torch.empty_like(scales)
        asked = torch.zeros_like(errors)  # what is still to be made up for in each row, by columns before
        for diagonal in range(blocks + groups - 1):
            first, last = max(0, diagonal - groups + 1), min(blocks - 1, diagonal)
            for start in range(first, last + 1, _TILES):
                tiles = [(b, diagonal - b) for b in range(start, min(start + _TILES, last + 1))]
                self._round(tiles, response, errors, asked, codes, scales, zeros, size, group)
        symmetric = bool(self.module.symmetric)
        return QuantizedModule(codes, scales.to(self.dtype), None if symmetric else zeros.to(torch.uint8))

    def _round(
        self,
        tiles: list[tuple[int, int]],
        response: Tensor,
        errors: Tensor,
        asked: Tensor,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor,
        size: int,
        group: int,
    ) -> None:
        num_bits, symmetric = self.module.num_bits, bool(self.module.symmetric)
        places = [(slice(b * size, (b + 1) * size), slice(c * group, (c + 1) * group)) for b, c in tiles]
        sources = torch.stack([self.weight[place] for place in places])
        others = torch.stack([response[rows] @ errors[:, columns] for rows, columns in places])
        wanted = sources + others + torch.stack([asked[place] for place in places])
        importance = torch.stack([self.pivots[columns] for _, columns in places]).unsqueeze(1)
        scale, zero = fit_grid(wanted, num_bits, symmetric, self.dtype, importance, CLIP_RATIOS)
        factors = torch.stack([self.factor[columns, columns] for _, columns in places])
        # Columns first, so that each lies in one piece: [g, tiles, rows].
        targets, whole = wanted.permute(2, 0, 1).contiguous(), (sources + others).permute(2, 0, 1).contiguous()
        factors = factors.permute(1, 2, 0).unsqueeze(-1).contiguous()
        step, origin = scale.squeeze(-1), zero.squeeze(-1)
        for j in range(group):
            code = quantize_to_grid(targets[j], step, origin, num_bits)
            error = whole[j] - (code - origin) * step
            targets[j + 1 :] += factors[j, j + 1 :] * error
            whole[j] = error
            targets[j] = code
        made, left = targets.permute(1, 2, 0), whole.permute(1, 2, 0)
        for number, (rows, columns) in enumerate(places):
            codes[rows, columns] = made[number].to(torch.uint8)
            errors[rows, columns] = left[number] - others[number]
            asked[rows, columns.stop :] += left[number] @ self.factor[columns, columns.stop :]
            scales[rows, columns.start // group] = step[number]
            zeros[rows, columns.start // group] = origin[number]


def _to_rows_before(fisher: Tensor, size: int) -> Tensor:
    """F = U D U^T: the rows that are still to come will make up for what they can."""
    found = factorize(InputStatistics(hessian=fisher.clone(), tokens=1), 1e-6).factor.T.tril(-1)
    return _without_own(found, size)


def _to_all_rows(fisher: Tensor, size: int) -> Tensor:
    """What is best for a block of rows, given all others."""
    own = torch.stack(list(_own_blocks(fisher, size)))
    found = torch.linalg.solve(own, fisher.view(-1, size, fisher.shape[1])).reshape(fisher.shape)
    return _without_own(found, size)


def _own_blocks(matrix: Tensor, size: int) -> list[Tensor]:
    return [matrix[a : a + size, a : a + size] for a in range(0, matrix.shape[0], size)]


def _without_own(matrix: Tensor, size: int) -> Tensor:
    matrix = matrix.contiguous()
    for block in _own_blocks(matrix, size):
        block.zero_()
    return matrix
