"""`measured`: each candidate is swapped in alone, and the KL divergence of the whole model is read.

The direct measurement that other methods stand for (the class of HIGGS, arXiv 2411.17525, and of EXL2 and EXL3): exact
for one swap, blind to what swaps do together, and the costliest: from the swapped block on, the model runs for each.
"""

from functools import partial

import torch
from torch import Tensor

from allocator.evaluate import Student
from allocator.score.tables import Table
from allocator.score.task import Task

__all__ = ["learn_measured"]


def learn_measured(task: Task) -> Table:
    """Nats of KL divergence a token."""
    student = Student.of_teacher(task.stream, task.bank, task.hidden, task.token_ids)
    scores: dict[str, Tensor] = {}

    def measure(name: str) -> Tensor:
        swaps = [student.losses({name: form}).kl.mean() for form in task.bank.formats(name)[:-1]]
        return torch.stack([*swaps, torch.zeros((), dtype=torch.float64)])

    of_blocks = [name for index in range(task.stream.blocks) for name in student.local_names(index).values()]
    for name in task.progress.over([*of_blocks, *student.vocabulary.formats], "measuring", "module"):
        scores[name] = task.once(f"measured-{name}", partial(measure, name))
    return Table(scores, "nats of KL divergence a token, of each swap alone")
