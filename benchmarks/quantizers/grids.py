"""What other grids than integers with 16-bit scales would bring: KL with the modules of two blocks quantized, by gptq.

    python benchmarks/quantizers/grids.py MODEL --text FILE --held-out FILE --blocks 2,5

Nothing of it can be served; it says what would be worth building. Each grid is compared at its own bytes: `gain` is its
KL over that of integers with as many bits a weight, the logarithm of whose KL is interpolated between 2, 3 and 4 bits.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from allocator.blocks import BlockStream  # noqa: E402
from allocator.blocks.calibration import calibration_from_text  # noqa: E402
from allocator.blocks.stream import record_inputs  # noqa: E402
from allocator.model import read_inventory  # noqa: E402
from allocator.quantize import InputStatistics  # noqa: E402
from allocator.quantize.grid import fit_grid  # noqa: E402
from allocator.quantize.ldl import LdlFactor, factorize  # noqa: E402
from benchmarks.record import write_result  # noqa: E402

CLIPS = tuple(1 - 0.05 * i for i in range(11))
Fit = Callable[[Tensor, Tensor], Tensor]
"""Of a group's weights `[N, g]` and the importance of its columns `[g]`: the levels of each row `[N, L]`."""


@dataclass(frozen=True)
class Grid:
    """group_size, and bits a weight beyond the codes; make: from the weight `[N, K]` and the importance of its columns,
    the fit of a group; outliers: share of the weights that keep 16 bits, each with a place of 16 bits."""

    name: str
    group_size: int
    bits: Callable[[int], float]
    make: Callable[[Tensor, Tensor, int, int], Fit]
    outliers: float = 0.0
    widths: tuple[int, ...] = (2, 3, 4)


def integers(_weight: Tensor, _importance: Tensor, num_bits: int, _group: int, keep: Any = None) -> Fit:
    def fit(block: Tensor, importance: Tensor) -> Tensor:
        scale, zero = fit_grid(block, num_bits, False, torch.bfloat16, importance, CLIPS)
        scale = scale if keep is None else keep(scale)
        return (torch.arange(1 << num_bits) - zero) * scale

    return fit


def integers_e4m3(weight: Tensor, importance: Tensor, num_bits: int, group: int) -> Fit:
    """Scales in 8 bits, times one in 16 bits a row."""
    spans = weight.view(len(weight), -1, group)
    row = (spans.amax(-1) - spans.amin(-1)).amax(-1, keepdim=True) / ((1 << num_bits) - 1) / 400

    def keep(scale: Tensor) -> Tensor:
        return (scale / row).clamp(max=448).to(torch.float8_e4m3fn).float() * row

    return integers(weight, importance, num_bits, group, keep)


def signed_floats(_weight: Tensor, _importance: Tensor, num_bits: int, _group: int) -> Fit:
    """The grids e2m0 and e2m1, which humming serves beside integers; a scale a group."""
    positive = {3: [1.0, 2, 4], 4: [0.5, 1, 1.5, 2, 3, 4, 6]}[num_bits]
    return scaled(torch.tensor([-level for level in positive] + [0.0, *positive]) / positive[-1])


def table(weight: Tensor, importance: Tensor, num_bits: int, group: int) -> Fit:
    """One table for a module, found by weighted k-means of weights over their group's largest; a scale a group."""
    groups = weight.view(len(weight), -1, group)
    most = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12)
    values = (groups / most / 0.85).flatten()
    weights = (most.square() * importance.view(1, -1, group)).flatten()
    chosen = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))[: 1 << 16]
    values, weights = values[chosen], weights[chosen]
    levels = torch.quantile(values, (torch.arange(1 << num_bits) + 0.5) / (1 << num_bits))
    for _ in range(30):
        nearest = (values.unsqueeze(1) - levels).abs().argmin(1)
        sums = torch.zeros_like(levels).index_add_(0, nearest, weights)
        means = torch.zeros_like(levels).index_add_(0, nearest, weights * values)
        levels = torch.where(sums > 0, means / sums.clamp_min(1e-30), levels)
    return scaled(levels)


def scaled(levels: Tensor) -> Fit:
    """`levels` times the scale that is best for each group."""

    def fit(block: Tensor, importance: Tensor) -> Tensor:
        largest = block.abs().amax(-1, keepdim=True).clamp_min(1e-12)
        best = torch.full((len(block),), math.inf)
        found = torch.zeros(len(block), len(levels))
        for clip in (*CLIPS, 1.05, 1.1, 1.2):
            candidate = (largest * clip).to(torch.bfloat16).float() * levels
            error = (nearest_of(block, candidate) - block).square() @ importance
            found = torch.where((error < best).unsqueeze(1), candidate, found)
            best = torch.minimum(error, best)
        return found

    return fit


GRIDS = [
    Grid("integers, groups of 128", 128, lambda b: (16 + b) / 128, integers),
    Grid("integers, groups of 64", 64, lambda b: (16 + b) / 64, integers),
    Grid("integers, groups of 64, e4m3 scales", 64, lambda b: (8 + b) / 64, integers_e4m3),
    Grid("integers, groups of 32, e4m3 scales", 32, lambda b: (8 + b) / 32, integers_e4m3),
    Grid("a table for a module, groups of 128", 128, lambda _b: 16 / 128, table),
    Grid("a table for a module, groups of 64", 64, lambda _b: 16 / 64, table),
    Grid("signed floating point, groups of 128", 128, lambda _b: 16 / 128, signed_floats, widths=(3, 4)),
    Grid("integers, groups of 128, 0.25 % outliers", 128, lambda b: (16 + b) / 128, integers, 0.0025),
    Grid("integers, groups of 128, 1 % outliers", 128, lambda b: (16 + b) / 128, integers, 0.01),
]


def nearest_of(values: Tensor, levels: Tensor) -> Tensor:
    """Values `[N, ...]` at the nearest of the levels `[N, L]` of their row."""
    flat = values.view(len(values), -1)
    number = (flat.unsqueeze(-1) - levels.unsqueeze(1)).abs().argmin(-1)
    return levels.gather(1, number).view(values.shape)


def gptq(weight: Tensor, ldl: LdlFactor, grid: Grid, num_bits: int) -> Tensor:
    """The weight as it would be computed from its codes: `allocator.quantize.gptq` with any grid."""
    fit, group = grid.make(weight, ldl.pivots, num_bits, grid.group_size), grid.group_size
    kept = torch.zeros_like(weight, dtype=torch.bool)
    if grid.outliers:
        cost = weight.square() * ldl.pivots
        kept = cost >= cost.flatten().kthvalue(round(cost.numel() * (1 - grid.outliers))).values
    errors, found = torch.zeros_like(weight), torch.empty_like(weight)
    for start in range(0, weight.shape[1], group):
        here = slice(start, start + group)
        targets = weight[:, here] + errors[:, :start] @ ldl.factor[:start, here]
        levels = fit(torch.where(kept[:, here], 0, targets), ldl.pivots[here])
        for j in range(group):
            column = nearest_of(targets[:, j], levels)
            column = torch.where(kept[:, start + j], targets[:, j].to(torch.bfloat16).float(), column)
            found[:, start + j] = column
            error = weight[:, start + j] - column
            errors[:, start + j] = error
            targets[:, j + 1 :] += error.unsqueeze(1) * ldl.factor[start + j, start + j + 1 : here.stop]
    return found


class Laboratory:
    """A model whose blocks `blocks` are quantized, all else original."""

    def __init__(self, model: Path, text: Path, held_out: Path, blocks: list[int], shape: tuple[int, int, int]) -> None:
        sequences, measured, length = shape
        self.stream, self.blocks = BlockStream(read_inventory(model)), blocks
        tokens = calibration_from_text(model, [text], sequences, length, 0).token_ids
        held = calibration_from_text(model, [held_out], measured, length, 1).token_ids
        self.factors: dict[str, LdlFactor] = {}
        self.weights: dict[str, Tensor] = {}
        with torch.inference_mode():
            states, held_states = self.stream.embed(tokens), self.stream.embed(held)
            for index in range(self.stream.blocks):
                block = self.stream.block(index)
                if index == blocks[0]:
                    self.begin = held_states
                if index in blocks:
                    self._see(block, states, index)
                if index < blocks[-1]:
                    states = self._through(block, states)
                held_states = self._through(block, held_states)
            self.head = self.stream.head()
            self.original = [self.head(one[:-1]).log_softmax(-1) for one in held_states]

    def _through(self, block: Any, states: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        return torch.cat([self.stream.run(block, rows, weights) for rows in states.split(4)])

    def _see(self, block: Any, states: Tensor, index: int) -> None:
        prefix = self.stream.inventory.block_prefix(index)
        names = [m.name.removeprefix(prefix) for m in self.stream.inventory.modules if m.block == index]
        sums: dict[tuple[str, ...], Tensor] = {}

        def add(sharing: list[str], inputs: Tensor) -> None:
            rows = inputs.reshape(-1, inputs.shape[-1])
            sums[tuple(sharing)] = sums.get(tuple(sharing), 0) + rows.T @ rows

        for rows in states.split(4):
            with record_inputs(block, names, add):
                self.stream.run(block, rows)
        for sharing, hessian in sums.items():
            factor = factorize(InputStatistics(hessian, states.shape[0] * states.shape[1]), 0.01)
            for name in sharing:
                self.factors[prefix + name] = factor
                self.weights[prefix + name] = block.get_parameter(f"{name}.weight").data

    def kl(self, grid: Grid, num_bits: int) -> float:
        with torch.inference_mode():
            states = self.begin
            for index in range(self.blocks[0], self.stream.blocks):
                block, weights = self.stream.block(index), {}
                if index in self.blocks:
                    prefix = self.stream.inventory.block_prefix(index)
                    for name in self.weights:
                        if name.startswith(prefix):
                            weights[f"{name.removeprefix(prefix)}.weight"] = gptq(
                                self.weights[name], self.factors[name], grid, num_bits
                            )
                states = self._through(block, states, weights)
            total = 0.0
            for one, original in zip(states, self.original, strict=True):
                ours = self.head(one[:-1]).log_softmax(-1)
                total += float((original.exp() * (original - ours)).sum(-1).mean())
            return total / len(states)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--blocks", default="2,5")
    parser.add_argument("--shape", default="64,24,256", help="sequences, of which measured on, their length")
    parser.add_argument("--widths", default="2,3,4")
    parser.add_argument("--only", default="", help="grids whose names have this; integers in groups of 128 always")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sequences, measured, length = map(int, args.shape.split(","))
    blocks = sorted(map(int, args.blocks.split(",")))
    laboratory = Laboratory(args.model, args.text, args.held_out, blocks, (sequences, measured, length))
    widths = [int(width) for width in args.widths.split(",")]
    rows: list[dict[str, Any]] = []
    for number, grid in enumerate(GRIDS):
        for width in widths:
            if width not in grid.widths or (number and args.only not in grid.name):
                continue
            bits = width + grid.bits(width) + 32 * grid.outliers
            rows.append(
                {
                    "model": args.model.name,
                    "blocks": blocks,
                    "grid": grid.name,
                    "width": width,
                    "bits": bits,
                    "kl": laboratory.kl(grid, width),
                }
            )
            base = [(r["bits"], math.log(r["kl"])) for r in rows if r["grid"] == GRIDS[0].name]
            if len(base) == len(widths):
                rows[-1]["gain"] = rows[-1]["kl"] / math.exp(interpolated(base, bits))
            print(rows[-1], flush=True)
    command = f"python benchmarks/quantizers/grids.py {args.model.name} --blocks {args.blocks} --shape {args.shape}"
    print(write_result("grids", command, [0, 1], rows, []))


def interpolated(points: list[tuple[float, float]], at: float) -> float:
    """Piecewise linear, the last piece going on."""
    lower = max((i for i in range(len(points) - 1) if points[i][0] <= at), default=0)
    (x0, y0), (x1, y1) = points[lower], points[lower + 1]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


if __name__ == "__main__":
    main()
