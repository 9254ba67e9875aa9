"""Where the divergence of a student would go: its slope along every candidate, from one backward pass in blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from allocator.candidates.block import Candidates
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
    losses, slopes, of_head = student.output_slopes(states[-1], assignment, rows, of_text)
    along: dict[str, Tensor] = {}
    vocabulary = student.vocabulary
    for index in reversed(range(student.stream.blocks)):
        block, candidates = student.block(index)
        weights = {name: w.clone().requires_grad_(True) for name, w in student.weights(index, assignment).items()}
        totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        below = []
        for before, slope in zip(states[index], slopes, strict=True):
            wanted = index > 0 or vocabulary.embedding is not None
            before = before.detach().requires_grad_(wanted)
            output = student.stream.run(block, before, weights)
            inputs = [*weights.values(), *([before] if wanted else [])]
            found = torch.autograd.grad(output, inputs, slope)
            for name, part in zip(weights, found, strict=False):
                totals[name] += part
            below.append(found[-1])
        slopes = below
        states[index + 1].clear()
        for local, name in student.local_names(index).items():
            along[name] = read(totals[f"{local}.weight"], _Weights(candidates, local)).cpu()
    outside = {} if of_head is None or vocabulary.head is None else {vocabulary.head: of_head}
    if vocabulary.embedding is not None:
        of_rows = _slope_of_table(student, vocabulary.embedding, assignment, slopes, rows)
        outside[vocabulary.embedding] = of_rows + outside.get(vocabulary.embedding, 0)
    along |= {name: read(slope, _Weights(vocabulary, name)).cpu() for name, slope in outside.items()}
    return Slopes(losses, along)


def _slope_of_table(
    student: Student, name: str, assignment: Assignment, slopes: Sequence[Tensor], rows: Tensor | None
) -> Tensor:
    """The slope by the embedding's weight `[V, D]`, given those by the states before block 0 in chunks."""
    table = student.vocabulary_weight(name, assignment).clone().requires_grad_(True)
    token_ids = student.token_ids if rows is None else student.token_ids[rows]
    total = torch.zeros_like(table)
    for ids, slope in zip(torch.split(token_ids, [len(s) for s in slopes]), slopes, strict=True):
        total += torch.autograd.grad(student.stream.embed(ids, table), table, slope)[0]
    return total


class _Weights(Sequence[Tensor]):
    """The weights of a module's candidates, each dequantized when it is asked for."""

    def __init__(self, candidates: Candidates, name: str) -> None:
        self._candidates, self._name = candidates, name

    def __len__(self) -> int:
        return len(self._candidates.formats[self._name])

    def __getitem__(self, index: Any) -> Any:
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return [self._candidates.weight(self._name, i) for i in numbers]
        return self._candidates.weight(self._name, numbers)
