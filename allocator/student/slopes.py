"""Where the divergence of a student would go: its slope along every candidate, from one backward pass in blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from allocator.student.student import Assignment, Losses, Student

__all__ = ["Slopes", "WeightSlope", "measure_slopes"]

WeightSlope = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""Given the slope of the loss by a module's weight `[N, K]` and its candidates' weights (16 bits last)."""


@dataclass(frozen=True)
class Slopes:
    """losses of the assignment itself; along: by module one number a candidate `[C]`, float64, 16 bits last."""

    losses: Losses
    along: dict[str, Tensor]


def _projections(slope: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return torch.stack([(slope * weight).sum(dtype=torch.float64) for weight in weights])


def measure_slopes(
    student: Student,
    assignment: Assignment,
    rows: Tensor | None = None,
    read: WeightSlope = _projections,
    of_text: bool = False,
) -> Slopes:
    """Slopes of the mean KL at `assignment` (of the text's loss with `of_text`), on the sequences `rows` or all.

    By default what `read` takes from the slope G is <G, Q_b> of every candidate b: by how much the loss would change,
    to first order, from one candidate to another is the difference of two of these numbers. Blocks are run again on
    the way back, so that one is resident, with the states between blocks in memory.
    """
    with torch.no_grad():
        states = student.states(assignment, rows)
    losses, slopes = student.output_slopes(states[-1], rows, of_text)
    along: dict[str, Tensor] = {}
    for index in reversed(range(student.stream.blocks)):
        block, candidates = student.block(index)
        weights = {name: w.clone().requires_grad_(True) for name, w in student.weights(index, assignment).items()}
        totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        below = []
        for before, slope in zip(states[index], slopes, strict=True):
            before = before.detach().requires_grad_(index > 0)
            output = student.stream.run(block, before, weights)
            inputs = [*weights.values(), *([before] if index > 0 else [])]
            found = torch.autograd.grad(output, inputs, slope)
            for name, part in zip(weights, found, strict=False):
                totals[name] += part
            below.append(found[-1])
        slopes = below
        states[index + 1].clear()
        for local, name in student.local_names(index).items():
            of_module = [candidates.weight(local, i) for i in range(len(candidates.formats[local]))]
            along[name] = read(totals[f"{local}.weight"], of_module).cpu()
    return Slopes(losses, along)
