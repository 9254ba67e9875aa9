"""`relaxed`: the published method (GAMMA, arXiv 2605.18475), as far as its text is public.

Each block gets the teacher's states and must give the teacher's output. Widths are drawn hard with Gumbel noise from
p = softmax(-(score + multiplier * bytes) / T), at a training budget that an augmented Lagrangian holds on the expected
bytes. F(p) = E_p[loss] + multiplier * E_p[bytes] - T H(p) is minimised over independent choices by its natural
gradient, marginal loss less score: each sample moves every score of its block towards the marginal losses there. Those
are the loss of the single swap, which is measured because the straight-through gradient is blind to it, and twice the
inner product with the errors of the other modules, which that gradient gives. The multiplier is explicit, so scores
are losses, carry no trace of the training budget, and serve the others. Modules outside the blocks, of which the
method says nothing, count in the bytes and are scored by their single swaps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from allocator.contract.errors import InputError
from allocator.contract.layout import module_bytes
from allocator.quantize.candidates import BlockCandidates
from allocator.score.objective import UNIT, gram_matrix, reconstruction_loss
from allocator.score.swapped_block import Batch
from allocator.score.tables import Table
from allocator.score.task import Task
from allocator.score.teacher import Teacher

__all__ = [
    "AugmentedLagrangian",
    "RelaxedWidths",
    "expected_bytes",
    "interactions",
    "learn_relaxed",
    "multiplier_of_budget",
    "probabilities",
    "sample",
]


@dataclass
class AugmentedLagrangian:
    """multiplier: loss a byte, never negative; penalty: loss a byte^2; budget_bytes: what expected bytes must meet."""

    multiplier: float
    penalty: float
    budget_bytes: float

    def effective(self, expected_bytes: float) -> float:
        """Derivative of the constraint terms by bytes: what one byte costs the relaxed choice now."""
        return max(0.0, self.multiplier + self.penalty * (expected_bytes - self.budget_bytes))

    def update(self, expected_bytes: float) -> None:
        """Dual ascent (Hestenes 1969, Powell 1969): the multiplier takes over the penalty's gradient."""
        self.multiplier = self.effective(expected_bytes)


def probabilities(scores: Tensor, nbytes: Tensor, multiplier: float, temperature: float) -> Tensor:
    """p `[C]` of one module; scores in loss, nbytes of its candidates, multiplier in loss a byte."""
    return torch.softmax(-(scores + multiplier * nbytes) / temperature, dim=-1)


def sample(probability: Tensor, generator: torch.Generator) -> int:
    """A hard sample by the Gumbel-max trick (Jang et al. 2017)."""
    uniform = torch.rand(probability.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    return int((probability.clamp_min(1e-300).log() - (-uniform.log()).log()).argmax())


def expected_bytes(scores: Sequence[Tensor], nbytes: Sequence[Tensor], multiplier: float, temperature: float) -> float:
    """Sum over modules of the expected bytes under `probabilities`."""
    pairs = zip(scores, nbytes, strict=True)
    return sum(float((probabilities(s, n, multiplier, temperature) * n).sum()) for s, n in pairs)


def multiplier_of_budget(
    scores: Sequence[Tensor], nbytes: Sequence[Tensor], budget_bytes: float, sharpness: float
) -> tuple[float, float]:
    """The multiplier at which the expected bytes meet the budget, and the temperature that goes with it.

    The temperature is `sharpness` times what one bit of an average module is worth: multiplier * mean bytes a bit.
    """
    bytes_a_bit = sum(float(n.max()) for n in nbytes) / len(nbytes) / 16
    low, high = 1e-30, 1e10
    for _ in range(200):
        middle = (low * high) ** 0.5
        temperature = sharpness * middle * bytes_a_bit
        if expected_bytes(scores, nbytes, middle, temperature) > budget_bytes:
            low = middle
        else:
            high = middle
    return high, sharpness * high * bytes_a_bit


_PASSES, _STEPS = 4, 16
"""Visits to each block, and samples drawn at each visit."""
_SHARPNESS = 0.5
"""Temperature, in units of what one bit of an average module is worth at the budget."""
_PENALTY = 2.0
"""Of the Lagrangian, relative to its first multiplier, for expected bytes of twice the budget."""


@dataclass
class RelaxedWidths:
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
    """Scores in nats, learned at `settings.average_bits`. Raises InputError for a model with experts."""
    if any(".experts." in name for name in task.bank.bank.modules):
        raise InputError("the method relaxed does not know experts; use --method gamma")
    choices = _measure(task)
    outcome = _sample(task, choices)
    return Table({name: c.scores for name, c in choices.items()}, UNIT, outcome=outcome)


def _measure(task: Task) -> dict[str, RelaxedWidths]:
    steps = {index: f"grams-{index:04d}" for index in range(task.stream.blocks)}
    if task.vocabulary().formats:
        steps[-1] = "grams-vocabulary"
    found = {index: task.journal.load(step) for index, step in steps.items()}
    if None in found.values():  # else gradients of a later pass may lie there
        for index, teacher in task.backward_by_block("measuring", vocabulary=True):
            found[index] = task.once(steps[index], partial(_measure_grams, task, teacher, index))
    choices: dict[str, RelaxedWidths] = {}
    for of_block in found.values():
        for name, (shares, grams) in (of_block or {}).items():
            nbytes = torch.tensor([module_bytes(f) for f in task.bank.formats(name)], dtype=torch.float64)
            losses = shares @ torch.diagonal(grams, dim1=1, dim2=2)
            choices[name] = RelaxedWidths(nbytes, grams, losses, losses.clone())
    return task.in_model_order(choices)


def _measure_grams(task: Task, teacher: Teacher, index: int) -> dict[str, tuple[Tensor, Tensor]]:
    """By module the share of each batch in all sequences `[batches]`, and its Gram matrices `[batches, C, C]`."""
    partition = teacher.partition(task.settings.batch_tokens)
    parts = dict(task.journal.process_group.share(partition))
    together = task.journal.process_group.gather(task.measure(teacher, index, parts, gram_matrix))
    shares = torch.tensor([len(rows) for rows in partition], dtype=torch.float64)
    shares /= shares.sum()
    return {name: (shares, torch.stack([of_batch[name] for of_batch in together])) for name in together[0]}


def _sample(task: Task, choices: dict[str, RelaxedWidths]) -> dict[str, Any]:
    """Learn the interactions; every process of a process group draws the same samples."""
    scores, nbytes = [c.scores for c in choices.values()], [c.nbytes for c in choices.values()]
    budget = _training_budget(task, nbytes)
    multiplier, temperature = multiplier_of_budget(scores, nbytes, budget, _SHARPNESS)
    lagrangian = AugmentedLagrangian(multiplier, _PENALTY * multiplier / budget, budget)
    generator = torch.Generator().manual_seed(task.settings.seed)
    losses: list[float] = []
    visits = 0
    kept = task.journal.load("sampling")
    if kept is not None:
        for name, c in choices.items():
            c.scores.copy_(kept["scores"][name])
            c.samples = kept["samples"][name]
        visits, lagrangian.multiplier, losses = kept["visits"], kept["multiplier"], kept["losses"]
        generator.set_state(kept["generator"])
    for number in range(visits // task.stream.blocks, _PASSES):
        # Gradients are computed anew in each pass: they are on the disk for one block at a time.
        of_pass = replace(task, journal=task.journal.section(f"pass-{number}"))
        done = visits - number * task.stream.blocks
        for position, (index, teacher) in enumerate(
            of_pass.backward_by_block(f"learning, pass {number + 1} of {_PASSES}")
        ):
            if position < done:
                task.progress.skip()
                continue
            if position == 0:
                losses.append(0.0)
            here = {local: choices[task.module(index, local)] for local in _locals(task, choices, index)}
            price = partial(_price, lagrangian, scores, nbytes, temperature)
            losses[-1] += _visit(task, teacher, index, here, price, temperature, generator)
            lagrangian.update(expected_bytes(scores, nbytes, lagrangian.multiplier, temperature))
            visits += 1
            state = {
                "visits": visits,
                "scores": {name: c.scores for name, c in choices.items()},
                "samples": {name: c.samples for name, c in choices.items()},
                "multiplier": lagrangian.multiplier,
                "losses": losses,
                "generator": generator.get_state(),
            }
            task.journal.save("sampling", state)
    return {
        "budget_bytes": round(budget),
        "expected_bytes": expected_bytes(scores, nbytes, lagrangian.multiplier, temperature),
        "multiplier": lagrangian.multiplier,
        "temperature": temperature,
        "loss_by_pass": losses,
    }


def _locals(task: Task, choices: dict[str, RelaxedWidths], index: int) -> list[str]:
    prefix = task.inventory.block_prefix(index)
    return [name.removeprefix(prefix) for name in choices if name.startswith(prefix)]


def _price(
    lagrangian: AugmentedLagrangian, scores: Sequence[Tensor], nbytes: Sequence[Tensor], temperature: float
) -> float:
    return lagrangian.effective(expected_bytes(scores, nbytes, lagrangian.multiplier, temperature))


def _visit(
    task: Task,
    teacher: Teacher,
    index: int,
    here: dict[str, RelaxedWidths],
    price: Callable[[], float],
    temperature: float,
    generator: torch.Generator,
) -> float:
    """Draw assignments of one block and learn from each; returns their mean loss."""
    block = task.stream.block(index)
    candidates = task.candidates(index, block)
    partition = teacher.partition(task.settings.batch_tokens)
    total = 0.0
    for _ in range(_STEPS):
        now = price()
        drawn = {
            local: sample(probabilities(c.scores, c.nbytes, now, temperature), generator) for local, c in here.items()
        }
        number = int(torch.randint(len(partition), (1,), generator=generator))
        batch = teacher.batch(task.stream, index, partition[number])
        grams = {local: c.grams[number] for local, c in here.items()}
        loss, found = interactions(task, block, candidates, drawn, grams, batch)
        total += loss / _STEPS
        for local, interaction in found.items():
            here[local].learn(interaction)
    return total


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
    gradients = torch.autograd.grad(loss, list(weights.values()))
    found = {}
    for (local, number), gradient in zip(drawn.items(), gradients, strict=True):
        gains = [(candidates.weight(local, i) * gradient).sum() for i in range(len(candidates.formats[local]))]
        first_order = (torch.stack(gains) - (candidates.source(local) * gradient).sum()).double().cpu()
        found[local] = first_order - 2 * grams[local][number]
    return float(loss.detach()), found
