"""Rounding against what follows too: GPTQ's feedback from column to column, and the like from row to row.

An error E of a weight costs about tr(F E H E^T) / 2 nats a token, H being second moments of the module's inputs and F
those of the gradients of the model's predictions at its outputs: the Fisher matrix, Kronecker-factored (K-FAC, Martens
and Grosse 2015; which moments: see `block_statistics`). GPTQ takes every row for itself; with F, rows make up for each
other's errors (YAQA, Tseng et al. 2025). Rows go in blocks, each rounded as GPTQ does at its weight and what the rows
before ask of it; then again, given all other rows.

Candidates are made one module at a time beside the original's others, so that each is good whatever width those have.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from allocator.contract.errors import InputError
from allocator.contract.layout import ModuleFormat
from allocator.quantize.gptq import CLIP_RATIOS, Gptq
from allocator.quantize.grid import fit_grid
from allocator.quantize.ldl import factorize
from allocator.quantize.quantizer import InputStatistics, QuantizedModule, Statistics

__all__ = ["Kfac"]

_LEAST_ROWS, _MOST_BLOCKS = 8, 128
"""Of a block, and blocks of a module. Its rows make up for others' errors and not for each other's: they are taken from
places of the module that are far from one another."""
_TILES = 64
"""Blocks of rows by groups of columns that are rounded at once."""


class Kfac:
    """`kfac`: needs the second moments of a module's inputs and of gradients at its outputs; without the latter, and
    for wide candidates, it is gptq (of inputs that count by those gradients).

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
        (found,) = self.quantize_together(weight, [module], dtype, statistics)
        return found

    def quantize_together(
        self, weight: Tensor, formats: Sequence[ModuleFormat], dtype: torch.dtype, statistics: InputStatistics | None
    ) -> list[QuantizedModule]:
        """Candidates that differ in their width alone, for the time of one: most of it is spent on the way from row to
        row."""
        narrow = [form for form in formats if form.num_bits <= self.up_to_bits]
        found: dict[int, QuantizedModule] = {}
        if narrow and statistics is not None and statistics.output_moments:
            inputs = factorize(statistics, self._gptq.damping)
            (moments,) = statistics.output_moments
            grids = _Grids(
                [f.num_bits for f in narrow], int(narrow[0].group_size or 0), bool(narrow[0].symmetric), dtype
            )
            rounding = _Rounding(weight, grids, inputs.factor, inputs.pivots)
            found = dict(zip(grids.num_bits, rounding.run(self._damped(moments), self.passes), strict=True))
        return [
            found[form.num_bits] if form.num_bits in found else self._gptq.quantize(weight, form, dtype, statistics)
            for form in formats
        ]

    def _damped(self, moments: Tensor) -> Tensor:
        """Positive definite, also where no gradient came."""
        mean = torch.diagonal(moments).double().mean().clamp_min(1e-30).float()
        return moments + self._gptq.damping * mean * torch.eye(moments.shape[0], device=moments.device)


@dataclass(frozen=True)
class _Grids:
    """Of candidates that are made together; dtype: of scales."""

    num_bits: list[int]
    group: int
    symmetric: bool
    dtype: torch.dtype

    def fit(self, wanted: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points `[W, T, R]` for weights `[W, T, R, g]`."""
        found = [
            fit_grid(of_width, bits, self.symmetric, self.dtype, importance, CLIP_RATIOS)
            for of_width, bits in zip(wanted, self.num_bits, strict=True)
        ]
        scale, zero = (torch.stack(parts).squeeze(-1) for parts in zip(*found, strict=True))
        return scale, zero


@dataclass(frozen=True)
class _Rounding:
    """W candidates of weight, float32 `[N, K]`; factor, pivots: of the inputs (see `ldl`)."""

    weight: Tensor
    grids: _Grids
    factor: Tensor
    pivots: Tensor

    def run(self, fisher: Tensor, passes: int) -> list[QuantizedModule]:
        """fisher: `[N, N]`. Of each candidate the best of all passes, by what it costs."""
        rows, columns = self.weight.shape
        wanted = max(_LEAST_ROWS, -(-rows // _MOST_BLOCKS))
        size = next(size for size in range(wanted, 0, -1) if rows % size == 0)
        order = torch.arange(rows, device=fisher.device).view(size, -1).T.reshape(-1)
        back = order.argsort()
        ordered = _Rounding(self.weight[order], self.grids, self.factor, self.pivots)
        fisher, upper = fisher[order][:, order], self.factor.triu(1)
        torch.diagonal(upper).fill_(1)
        errors = self.weight.new_zeros(len(self.grids.num_bits), rows, columns)
        best: list[tuple[float, QuantizedModule]] = []
        for number in range(passes + 1):
            response = _to_rows_before(fisher, size) if number == 0 else _to_all_rows(fisher, size)
            found = ordered._pass(response, errors, size)
            costs = [ordered._cost(fisher, upper, of_one) for of_one in errors]
            new = list(zip(costs, found, strict=True))
            best = [min(pair, key=lambda one: one[0]) for pair in zip(best, new, strict=True)] if best else new
        return [
            QuantizedModule(m.codes[back], m.scale[back], None if m.zero_point is None else m.zero_point[back])
            for _, m in best
        ]

    def _cost(self, fisher: Tensor, upper: Tensor, errors: Tensor) -> float:
        """tr(F E H E^T), H by its factors."""
        at_pivots = (errors @ upper) * self.pivots.sqrt()
        return float((fisher @ at_pivots).mul_(at_pivots).sum())

    def _pass(self, response: Tensor, errors: Tensor, size: int) -> list[QuantizedModule]:
        """Round all rows, and put weight less quantized weight into `errors`, `[W, N, K]`, which has those of before.

        response: `[N, N]`, what a row adds to its weight of the errors of others. A tile, a block of rows by a group of
        columns, waits for the rows before it and the columns before it: tiles of one diagonal are rounded together.
        """
        made = _Made.room_for(errors, self.grids.group)
        blocks, groups = errors.shape[1] // size, errors.shape[2] // self.grids.group
        for diagonal in range(blocks + groups - 1):
            first, last = max(0, diagonal - groups + 1), min(blocks - 1, diagonal)
            for start in range(first, last + 1, _TILES):
                tiles = [(b, diagonal - b) for b in range(start, min(start + _TILES, last + 1))]
                self._round([_Tile.at(b, c, size, self.grids.group) for b, c in tiles], response, errors, made)
        return made.modules(self.grids)

    def _round(self, tiles: "list[_Tile]", response: Tensor, errors: Tensor, made: "_Made") -> None:
        def of_all(tensor: Tensor) -> Tensor:
            return torch.stack([tensor[:, t.rows, t.columns] for t in tiles], 1)  # [W, T, R, g]

        others = torch.stack([response[t.rows] @ errors[:, :, t.columns] for t in tiles], 1)
        whole = torch.stack([self.weight[t.rows, t.columns] for t in tiles]) + others
        wanted = whole + of_all(made.asked)
        importance = torch.stack([self.pivots[t.columns] for t in tiles]).unsqueeze(1)
        scale, zero = self.grids.fit(wanted, importance)
        top = torch.tensor([float((1 << bits) - 1) for bits in self.grids.num_bits], device=scale.device)[:, None, None]
        factors = torch.stack([self.factor[t.columns, t.columns] for t in tiles])
        # Columns first, so that each lies in one piece: [g, W, T, R].
        targets, left = wanted.permute(3, 0, 1, 2).contiguous(), whole.permute(3, 0, 1, 2).contiguous()
        factors = factors.permute(1, 2, 0)[:, :, None, :, None].contiguous()
        lowest, highest = -zero, top - zero
        for j in range(self.grids.group):
            step = torch.minimum(torch.maximum((targets[j] / scale).round_(), lowest), highest)
            error = left[j] - step * scale
            targets[j + 1 :] += factors[j, j + 1 :] * error
            left[j] = error
            targets[j] = step
        steps, left = targets.permute(1, 2, 3, 0), left.permute(1, 2, 3, 0)
        for number, t in enumerate(tiles):
            made.codes[:, t.rows, t.columns] = (steps[:, number] + zero[:, number].unsqueeze(-1)).to(torch.uint8)
            errors[:, t.rows, t.columns] = left[:, number] - others[:, number]
            made.asked[:, t.rows, t.columns.stop :] += left[:, number] @ self.factor[t.columns, t.columns.stop :]
            made.scales[:, t.rows, t.group], made.zeros[:, t.rows, t.group] = scale[:, number], zero[:, number]


@dataclass(frozen=True)
class _Tile:
    rows: slice
    columns: slice
    group: int

    @classmethod
    def at(cls, block: int, group: int, size: int, width: int) -> "_Tile":
        return cls(slice(block * size, (block + 1) * size), slice(group * width, (group + 1) * width), group)


@dataclass(frozen=True)
class _Made:
    """What a pass has made so far. asked: what columns before ask each weight to make up for, `[W, N, K]`."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    asked: Tensor

    @classmethod
    def room_for(cls, errors: Tensor, group: int) -> "_Made":
        of_groups = errors.new_empty(*errors.shape[:2], errors.shape[2] // group)
        codes = torch.empty(errors.shape, dtype=torch.uint8, device=errors.device)
        return cls(codes, of_groups, torch.empty_like(of_groups), torch.zeros_like(errors))

    def modules(self, grids: _Grids) -> list[QuantizedModule]:
        zeros = [None if grids.symmetric else of_one.to(torch.uint8) for of_one in self.zeros]
        scales = self.scales.to(grids.dtype)
        return [QuantizedModule(*parts) for parts in zip(self.codes, scales, zeros, strict=True)]


def _to_rows_before(fisher: Tensor, size: int) -> Tensor:
    """F = U D U^T: the rows that are still to come will make up for what they can."""
    found = factorize(InputStatistics(hessian=fisher.clone(), tokens=1), 1e-6).factor.T.tril(-1)
    return _without_own(found, size)


def _to_all_rows(fisher: Tensor, size: int) -> Tensor:
    """What is best for a block of rows, given all others."""
    own = torch.stack(_own_blocks(fisher, size))
    found = torch.linalg.solve(own, fisher.view(-1, size, fisher.shape[1])).reshape(fisher.shape)
    return _without_own(found, size)


def _own_blocks(matrix: Tensor, size: int) -> list[Tensor]:
    return [matrix[a : a + size, a : a + size] for a in range(0, matrix.shape[0], size)]


def _without_own(matrix: Tensor, size: int) -> Tensor:
    matrix = matrix.contiguous()
    for block in _own_blocks(matrix, size):
        block.zero_()
    return matrix
