"""`deltaloss`: the score of AutoRound's AutoScheme (SignRoundV2, arXiv 2512.04746).

For each width the whole model is set to it, and the gradient G of the text's loss is read there; the score of a module
at that width is the sum over its weights, and over batches of text, of |G (W - Q_b)|. The gradient is read with what
stands outside the blocks at 16 bits, which is where AutoRound leaves the lm_head unless it is told otherwise.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from allocator.learning.methods.task import Task
from allocator.learning.tables import Table
from allocator.student import Student, measure_slopes

__all__ = ["learn_deltaloss"]


def learn_deltaloss(task: Task) -> Table:
    """Nats a token of loss of the text, to first order, signs ignored."""
    student = Student.of_teacher(task.stream, task.bank, task.hidden, task.token_ids)
    widths = sorted({f.num_bits for module in task.bank.bank.modules.values() for f in module.candidates})
    scores = {name: torch.zeros(len(task.bank.formats(name)), dtype=torch.float64) for name in task.bank.bank.modules}
    batches = torch.split(
        torch.arange(task.hidden.shape[0]), max(1, task.settings.batch_tokens // task.hidden.shape[1])
    )
    for bits in task.progress.over(widths, "measuring", "width"):
        found = task.once(f"deltaloss-{bits}", partial(_at, task, student, bits, batches))
        for name, value in found.items():
            number = [f.num_bits for f in task.bank.formats(name)].index(bits)
            scores[name][number] = value
    return Table(scores, "nats of the text's loss a token, to first order, signs ignored")


def _at(task: Task, student: Student, bits: int, batches: Sequence[Tensor]) -> dict[str, float]:
    at_width = {
        name: form for name in task.bank.bank.modules for form in task.bank.formats(name) if form.num_bits == bits
    }
    assignment = {name: form for name, form in at_width.items() if name not in student.vocabulary.formats}
    totals = dict.fromkeys(at_width, 0.0)
    for rows in batches:
        slopes = measure_slopes(student, assignment, rows, _absolute, of_text=True)
        for name, form in at_width.items():
            totals[name] += float(slopes.along[name][task.bank.formats(name).index(form)]) * len(rows)
    return {name: total / task.hidden.shape[0] for name, total in totals.items()}


def _absolute(slope: Tensor, weights: Sequence[Tensor]) -> Tensor:
    source = weights[-1]
    return torch.stack([(slope * (source - weight)).abs().sum(dtype=torch.float64) for weight in weights])
