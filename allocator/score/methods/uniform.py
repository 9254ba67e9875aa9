"""`uniform`: every weight of the model counts the same, and half the step for each bit: no calibration text is used.

For trying the way from a model to a server in seconds, and as the least that any method must beat.
"""

import torch

from allocator.score.tables import Table
from allocator.score.task import Task

__all__ = ["learn_uniform"]


def learn_uniform(task: Task) -> Table:
    """parameters * 4^-bits: the squared rounding error of weights that are spread alike in every module."""
    scores = {}
    for name in task.bank.bank.modules:
        formats = task.bank.formats(name)
        parameters = formats[0].shape[0] * formats[0].shape[1]
        scores[name] = torch.tensor(
            [parameters * 4.0**-f.num_bits if f.quantized else 0.0 for f in formats], dtype=torch.float64
        )
    return Table(scores, "weights times 4^-bits")
