"""`gamma`: losses of single swaps in the Fisher metric, and of every pair of candidates, from one pass over the blocks.

Each block gets the teacher's states (teacher forcing); each candidate is swapped in alone. Its loss is the mean of
(g . e)^2 / 2 over tokens and probes (see `objective`). The same numbers g . e, kept for a share of the tokens, give the
correlation of any two candidates of the model: what their errors add to or take from each other.
"""

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor

from allocator.score.objective import UNIT, UNIT_OF_DIRECTIONS, Kinds, correlations, losses_of_errors
from allocator.score.tables import Table
from allocator.score.task import Task
from allocator.score.teacher import Teacher

__all__ = ["learn_gamma"]

MOST_CANDIDATES = 5000
"""Above this the pairs would not fit into the scores file (64 MB); then there are none."""


def learn_gamma(task: Task) -> Table:
    """Losses of single swaps in nats, and correlations of their errors."""
    pairs = sum(len(module.candidates) for module in task.bank.bank.modules.values()) <= MOST_CANDIDATES
    losses: dict[str, Tensor] = {}
    errors: dict[str, Tensor] = {}
    for index, teacher in task.backward_by_block("measuring", vocabulary=True):
        step = f"measured-{index:04d}" if index >= 0 else "measured-vocabulary"
        found = task.once(step, partial(_measure, task, teacher, index, pairs))
        losses |= {name: of_module for name, (of_module, _) in found.items()}
        errors |= {name: kept[:-1] for name, (_, kept) in found.items()}
    scores = task.in_model_order(losses)
    kept = [errors[name] for name in scores]
    unit = UNIT_OF_DIRECTIONS if task.inventory.shape.head == "states" else UNIT
    return Table(scores, unit, correlations(torch.cat(kept), _kinds(task, scores)) if pairs and kept else None)


def _kinds(task: Task, modules: Collection[str]) -> Kinds:
    """Of the candidates of `modules`; each of those outside the blocks is a block of its own."""
    block_of = {m.name: m.block for m in task.inventory.modules}
    outside = {name: -1 - number for number, name in enumerate(n for n in modules if block_of[n] is None)}
    rows = [
        (number, outside.get(name, block_of[name]), form.num_bits)
        for number, name in enumerate(modules)
        for form in task.bank.formats(name)[:-1]
    ]
    return Kinds(*torch.tensor(rows).T)


def _measure(task: Task, teacher: Teacher, index: int, pairs: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """By module of a block (of the vocabulary for -1) the losses `[C]`, and errors `[C, n]` of a share of the tokens in
    float16, scaled to 1."""
    partition = teacher.partition(task.settings.batch_tokens)
    tokens = task.hidden.shape[0] * task.hidden.shape[1]
    stride = max(1, -(-tokens * task.settings.draws // task.settings.pair_samples))
    parts = dict(task.journal.process_group.share(partition))

    def reduce(errors: Tensor) -> tuple[Tensor, Tensor]:
        return losses_of_errors(errors), errors[:, ::stride] if pairs else errors[:, :0]

    together = task.journal.process_group.gather(task.measure(teacher, index, parts, reduce))
    shares = torch.tensor([len(rows) for rows in partition], dtype=torch.float64)
    found = {}
    for name in together[0]:
        losses = shares @ torch.stack([of_batch[name][0] for of_batch in together]) / shares.sum()
        kept = torch.cat([of_batch[name][1] for of_batch in together], 1)
        found[name] = (losses, (kept / (2 * losses).sqrt().clamp_min(1e-30).unsqueeze(1)).half())
    return found
