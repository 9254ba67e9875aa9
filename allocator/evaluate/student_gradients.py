"""Where the divergence of a student would go: its gradient along every candidate, from one backward pass in blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from allocator.evaluate.student import Assignment, Losses, Student
from allocator.quantize.candidates import Candidates

__all__ = ["StudentGradients", "measure_gradients"]


@dataclass(frozen=True)
class StudentGradients:
    """losses of the assignment itself; along: by module one number a candidate `[C]`, float64, 16 bits last."""

    losses: Losses
    along: dict[str, Tensor]


def _projections(gradient: Tensor, candidates: Candidates, name: str) -> Tensor:
    weights = (candidates.weight(name, number) for number in range(len(candidates.formats[name])))
    return torch.stack([(gradient * weight).sum(dtype=torch.float64) for weight in weights]).cpu()


def measure_gradients(student: Student, assignment: Assignment, rows: Tensor | None = None) -> StudentGradients:
    """StudentGradients of the mean KL at `assignment`, on the sequences `rows` or all.

    What is told of the gradient G is <G, Q_b> of every candidate b: by how much the loss would change, to first order,
    from one candidate to another is the difference of two of these numbers. Blocks are run again on the way back, so
    that one is resident, with the states between blocks in memory.
    """
    with torch.no_grad():
        states = student.states(assignment, rows)
    losses, gradients, of_head = student.output_gradients(states[-1], assignment, rows)
    along: dict[str, Tensor] = {}
    vocabulary = student.vocabulary
    for index in reversed(range(student.stream.blocks)):
        block, candidates = student.block(index)
        weights = {name: w.clone().requires_grad_(True) for name, w in student.weights(index, assignment).items()}
        totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        below = []
        for before, gradient in zip(states[index], gradients, strict=True):
            wanted = index > 0 or vocabulary.embedding is not None
            before = before.detach().requires_grad_(wanted)
            output = student.stream.run(block, before, weights)
            inputs = [*weights.values(), *([before] if wanted else [])]
            found = torch.autograd.grad(output, inputs, gradient)
            for name, part in zip(weights, found, strict=False):
                totals[name] += part
            below.append(found[-1])
        gradients = below
        states[index + 1].clear()
        for local, name in student.local_names(index).items():
            along[name] = _projections(totals[f"{local}.weight"], candidates, local)
    outside = {} if of_head is None or vocabulary.head is None else {vocabulary.head: of_head}
    if vocabulary.embedding is not None:
        of_rows = _gradient_of_table(student, vocabulary.embedding, assignment, gradients, rows)
        outside[vocabulary.embedding] = of_rows + outside.get(vocabulary.embedding, 0)
    along |= {name: _projections(gradient, vocabulary, name) for name, gradient in outside.items()}
    return StudentGradients(losses, along)


def _gradient_of_table(
    student: Student, name: str, assignment: Assignment, gradients: Sequence[Tensor], rows: Tensor | None
) -> Tensor:
    """The gradient by the embedding's weight `[V, D]`, given those by the states before block 0 in chunks."""
    table = student.vocabulary_weight(name, assignment).clone().requires_grad_(True)
    token_ids = student.token_ids if rows is None else student.token_ids[rows]
    total = torch.zeros_like(table)
    for ids, gradient in zip(torch.split(token_ids, [len(s) for s in gradients]), gradients, strict=True):
        total += torch.autograd.grad(student.stream.embed(ids, table), table, gradient)[0]
    return total
