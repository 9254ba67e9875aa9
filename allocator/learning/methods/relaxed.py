"""`relaxed`: the published method (GAMMA, arXiv 2605.18475), as far as its text is public.

Each block gets the teacher's states and must give the teacher's output. Widths are drawn hard with Gumbel noise from
p = softmax(-(score + multiplier * bytes) / T), at a training budget that an augmented Lagrangian holds on the expected
bytes. F(p) = E_p[loss] + multiplier * E_p[bytes] - T H(p) is minimised over independent choices by its natural
gradient, marginal loss less score: each sample moves every score of its block towards the marginal losses there. Those
are the loss of the single swap, which is measured because the straight-through gradient is blind to it, and twice the
inner product with the errors of the other modules, which that gradient gives. The multiplier is explicit, so scores
are losses, carry no trace of the training budget, and serve the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from allocator.candidates.block import BlockCandidates
from allocator.contract.layout import module_bytes
from allocator.learning.block import Batch, measure_swaps
from allocator.learning.lagrangian import AugmentedLagrangian
from allocator.learning.methods.task import Task
from allocator.learning.objective import UNIT, gram_matrix, reconstruction_loss
from allocator.learning.relaxation import expected_bytes, multiplier_of_budget, probabilities, sample
from allocator.learning.tables import Table
from allocator.learning.teacher import Teacher

__all__ = ["Choice", "interactions", "learn_relaxed"]

_PASSES, _STEPS = 4, 16
"""Visits to each block, and samples drawn at each visit."""
_SHARPNESS = 0.5
"""Temperature, in units of what one bit of an average module is worth at the budget."""
_PENALTY = 2.0
"""Of the Lagrangian, relative to its first multiplier, for expected bytes of twice the budget."""


@dataclass
class Choice:
    """One module: bytes of its candidates `[C]`, Gram matrices of their errors `[batches, C, C]`, losses of the single
    swaps `[C]`, and the scores `[C]`: those losses and the running mean of the sampled interactions."""

    nbytes: Tensor
    grams: Tensor
    losses: Tensor
    scores: Tensor
    samples: int = 0

    def learn(self, interaction: Tensor) -> None:
        self.samples += 1
        # None at all counts as the first sample.
        self.scores += (self.losses + interaction - self.scores) / (self.samples + 1)


def learn_relaxed(task: Task) -> Table:
    """Scores in nats, learned at `settings.average_bits`."""
    teacher = task.teacher()
    partition = teacher.partition(task.settings.batch_tokens)
    choices = _measure(task, teacher, partition)
    outcome = _sample(task, teacher, partition, choices)
    return Table({name: c.scores for name, c in choices.items()}, UNIT, outcome=outcome)


def _measure(task: Task, teacher: Teacher, partition: Sequence[Tensor]) -> dict[str, Choice]:
    shares = torch.tensor([len(rows) for rows in partition], dtype=torch.float64)
    choices: dict[str, Choice] = {}
    for index in task.blocks("measuring"):
        found = task.journal.once(f"grams-{index:04d}", partial(_measure_block, task, teacher, partition, index))
        for local, grams in found.items():
            name = task.module(index, local)
            nbytes = torch.tensor([module_bytes(f) for f in task.bank.formats(name)], dtype=torch.float64)
            losses = shares @ torch.diagonal(grams, dim1=1, dim2=2) / shares.sum()
            choices[name] = Choice(nbytes, grams, losses, losses.clone())
    return choices


def _measure_block(task: Task, teacher: Teacher, partition: Sequence[Tensor], index: int) -> dict[str, Tensor]:
    block = task.stream.block(index)
    candidates = task.candidates(index, block)
    readers = {
        number: partial(teacher.batch, task.stream, index, rows) for number, rows in task.journal.team.share(partition)
    }
    errors = measure_swaps(task.stream, block, candidates, readers)
    mine = {n: {local: gram_matrix(e) for local, e in of_batch.items()} for n, of_batch in errors.items()}
    together = task.journal.team.gather(mine)
    return {local: torch.stack([of_batch[local] for of_batch in together]) for local in candidates.formats}


def _sample(task: Task, teacher: Teacher, partition: Sequence[Tensor], choices: dict[str, Choice]) -> dict[str, Any]:
    """Learn the interactions; every process of a team draws the same samples."""
    scores, nbytes = [c.scores for c in choices.values()], [c.nbytes for c in choices.values()]
    budget = _training_budget(task, nbytes)
    multiplier, temperature = multiplier_of_budget(scores, nbytes, budget, _SHARPNESS)
    lagrangian = AugmentedLagrangian(multiplier, _PENALTY * multiplier / budget, budget)
    generator = torch.Generator().manual_seed(task.settings.seed)
    losses: list[float] = []
    visits = _PASSES * task.stream.blocks
    kept = task.journal.load("sampling")
    if kept is not None:
        for name, c in choices.items():
            c.scores.copy_(kept["scores"][name])
            c.samples = kept["samples"][name]
        lagrangian.multiplier, losses = kept["multiplier"], kept["losses"]
        generator.set_state(kept["generator"])
    for visit in range(0 if kept is None else kept["visits"], visits):
        task.progress("learning", visit / visits)
        index = visit % task.stream.blocks
        if index == 0:
            losses.append(0.0)
        block = task.stream.block(index)
        candidates = task.candidates(index, block)
        here = {local: choices[task.module(index, local)] for local in candidates.formats}
        for _ in range(_STEPS):
            price = lagrangian.effective(expected_bytes(scores, nbytes, lagrangian.multiplier, temperature))
            drawn = {
                local: sample(probabilities(c.scores, c.nbytes, price, temperature), generator)
                for local, c in here.items()
            }
            number = int(torch.randint(len(partition), (1,), generator=generator))
            batch = teacher.batch(task.stream, index, partition[number])
            grams = {local: c.grams[number] for local, c in here.items()}
            loss, found = interactions(task, block, candidates, drawn, grams, batch)
            losses[-1] += loss / _STEPS
            for local, interaction in found.items():
                here[local].learn(interaction)
        lagrangian.update(expected_bytes(scores, nbytes, lagrangian.multiplier, temperature))
        task.journal.save(
            "sampling",
            {
                "visits": visit + 1,
                "scores": {name: c.scores for name, c in choices.items()},
                "samples": {name: c.samples for name, c in choices.items()},
                "multiplier": lagrangian.multiplier,
                "losses": losses,
                "generator": generator.get_state(),
            },
        )
    task.progress("learning", 1.0)
    return {
        "budget_bytes": round(budget),
        "expected_bytes": expected_bytes(scores, nbytes, lagrangian.multiplier, temperature),
        "multiplier": lagrangian.multiplier,
        "temperature": temperature,
        "loss_by_pass": losses,
    }


def _training_budget(task: Task, nbytes: Sequence[Tensor]) -> float:
    """Bytes of the quantizable modules at the training budget, kept inside what they can have."""
    shapes = [task.bank.formats(name)[0].shape for name in task.bank.bank.modules]
    budget = task.settings.average_bits * sum(rows * columns for rows, columns in shapes) / 8
    low, high = (sum(float(pick(n)) for n in nbytes) for pick in (torch.min, torch.max))
    return min(max(budget, low * 1.001), high * 0.999)


def interactions(
    task: Task,
    block: nn.Module,
    candidates: BlockCandidates,
    drawn: dict[str, int],
    grams: dict[str, Tensor],
    batch: Batch,
) -> tuple[float, dict[str, Tensor]]:
    """Loss of one sampled assignment, and by module what each candidate's error and those of the other modules add to
    each other's loss: `[C]`. `grams` are those of the same batch, `[C, C]`.

    The straight-through gradient G at the sampled weights gives <G, Q_b - W> = 2 <e_b, e_all> to first order, e being
    output errors. It counts the module's own sampled error b' as well, 2 <e_b, e_b'>, which is known from the measured
    swaps and taken off.
    """
    weights = {local: candidates.weight(local, number).clone().requires_grad_(True) for local, number in drawn.items()}
    output = task.stream.run(block, batch.states, {f"{local}.weight": w for local, w in weights.items()})
    loss = reconstruction_loss(output, batch.teacher, batch.gradients)
    slopes = torch.autograd.grad(loss, list(weights.values()))
    found = {}
    for (local, number), slope in zip(drawn.items(), slopes, strict=True):
        gains = [(candidates.weight(local, i) * slope).sum() for i in range(len(candidates.formats[local]))]
        first_order = (torch.stack(gains) - (candidates.source(local) * slope).sum()).double().cpu()
        found[local] = first_order - 2 * grams[local][number]
    return float(loss.detach()), found
