"""`gamma`: losses of single swaps in the Fisher metric, and of every pair of candidates, from one pass over the blocks.

Each block gets the teacher's states (teacher forcing); each candidate is swapped in alone. Its loss is the mean of
(g . e)^2 / 2 over tokens and draws (see `objective`). The same numbers g . e, kept for a share of the tokens, give the
correlation of any two candidates of the model: what their errors add to or take from each other.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from allocator.learning.block import measure_swaps
from allocator.learning.methods.task import Task
from allocator.learning.objective import UNIT, Kinds, correlations, losses_of_errors
from allocator.learning.tables import Table, with_unseen_experts
from allocator.learning.teacher import Teacher

__all__ = ["learn_gamma"]

MOST_CANDIDATES = 5000
"""Above this the pairs would not fit into the scores file (64 MB); then there are none."""


def learn_gamma(task: Task) -> Table:
    """Losses of single swaps in nats, and correlations of their errors."""
    pairs = sum(len(module.candidates) for module in task.bank.bank.modules.values()) <= MOST_CANDIDATES
    found: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
    for index, teacher in task.descend("measuring"):
        measure = partial(_measure_block, task, teacher, index, pairs)
        found[index] = task.journal.once(f"measured-{index:04d}", measure)
    scores: dict[str, Tensor] = {}
    errors: list[Tensor] = []
    for index in sorted(found):
        losses = with_unseen_experts({local: losses for local, (losses, _) in found[index].items()})
        scores |= {task.module(index, local): of_module for local, of_module in losses.items()}
        errors += [kept[:-1] for _, kept in found[index].values()]
    return Table(scores, UNIT, correlations(torch.cat(errors), _kinds(task, found)) if pairs and errors else None)


def _kinds(task: Task, found: Mapping[int, Mapping[str, object]]) -> Kinds:
    """Of the candidates of the modules in `found`, in its order of blocks."""
    modules = [(index, task.module(index, local)) for index in sorted(found) for local in found[index]]
    rows = [
        (number, index, form.num_bits)
        for number, (index, name) in enumerate(modules)
        for form in task.bank.formats(name)[:-1]
    ]
    return Kinds(*torch.tensor(rows).T)


def _measure_block(task: Task, teacher: Teacher, index: int, pairs: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """By module of the block the losses `[C]`, and errors `[C, n]` of a share of the tokens in float16, scaled to 1."""
    block = task.stream.block(index)
    candidates = task.candidates(index, block)
    partition = teacher.partition(task.settings.batch_tokens)
    tokens = task.hidden.shape[0] * task.hidden.shape[1]
    stride = max(1, -(-tokens * task.settings.draws // task.settings.pair_samples))
    readers = {
        number: partial(teacher.batch, task.stream, index, rows) for number, rows in task.journal.team.share(partition)
    }

    def reduce(errors: Tensor) -> tuple[Tensor, Tensor]:
        return losses_of_errors(errors), errors[:, ::stride] if pairs else errors[:, :0]

    mine = measure_swaps(task.stream, block, candidates, readers, reduce)
    together = task.journal.team.gather(mine)
    shares = torch.tensor([len(rows) for rows in partition], dtype=torch.float64)
    found = {}
    for local in candidates.formats:
        losses = shares @ torch.stack([of_batch[local][0] for of_batch in together]) / shares.sum()
        kept = torch.cat([of_batch[local][1] for of_batch in together], 1)
        found[local] = (losses, (kept / (2 * losses).sqrt().clamp_min(1e-30).unsqueeze(1)).half())
    return found
