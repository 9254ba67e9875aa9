"""The loop of stage I: measure single swaps in every block, then learn what the modules do to each other.

The relaxed objective F(p) = E_p[loss] + multiplier * E_p[bytes] - T H(p) is minimised over independent choices by
its natural gradient, which is marginal loss minus score: each step moves every score of the visited block towards
the marginal losses at one hard Gumbel sample, which are the measured loss and the sampled interaction. Under teacher
forcing blocks are coupled by the budget alone, so one block is resident at a time.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from allocator.blocks.gradients import fill_gradients
from allocator.blocks.hidden import HiddenStates
from allocator.blocks.stream import BlockStream
from allocator.candidates.block import BlockCandidates
from allocator.candidates.reader import BankReader
from allocator.contract.layout import ModuleFormat, module_bytes
from allocator.contract.scores import Candidate, ScoredModule, Scores
from allocator.inventory import Inventory
from allocator.learning.block import Batch, BlockLearner
from allocator.learning.lagrangian import AugmentedLagrangian
from allocator.learning.objective import UNIT
from allocator.learning.relaxation import expected_bytes, multiplier_of_budget, probabilities, sample
from allocator.learning.settings import LearningSettings
from allocator.progress import Progress, silent
from allocator.running import Journal

__all__ = ["learn_scores"]


@dataclass
class _Choice:
    """What is known of one module: its candidates, their measured losses `[C]` and Gram matrices `[batches, C, C]`,
    and its scores `[C]`: the losses and the running mean of learned interactions."""

    formats: list[ModuleFormat]
    nbytes: Tensor
    grams: Tensor
    losses: Tensor
    scores: Tensor
    samples: int = 0

    def learn(self, interaction: Tensor) -> None:
        self.samples += 1
        # None at all counts as the first sample.
        self.scores += (self.losses + interaction - self.scores) / (self.samples + 1)


@dataclass(frozen=True)
class _Teacher:
    """What the original model did on the calibration text: its states and, draw by draw, its gradients."""

    hidden: HiddenStates
    gradients: list[HiddenStates]

    def batch(self, stream: BlockStream, index: int, rows: Tensor) -> Batch:
        """Input, output and output gradients of block `index` for some sequences."""
        states, teacher = (self.hidden.boundary(i)[rows].to(stream.device) for i in (index, index + 1))
        gradients = torch.stack([g.boundary(index + 1)[rows] for g in self.gradients])
        return Batch(states, teacher, gradients.to(stream.device).float())

    def partition(self, tokens: int) -> list[Tensor]:
        """All sequences, cut into batches of about `tokens` tokens."""
        return list(torch.split(torch.arange(self.hidden.shape[0]), max(1, tokens // self.hidden.shape[1])))


def learn_scores(
    inventory: Inventory,
    stream: BlockStream,
    bank: BankReader,
    hidden: HiddenStates,
    settings: LearningSettings,
    progress: Progress = silent,
    journal: Journal | None = None,
) -> Scores:
    """Scores of every candidate (`objective.UNIT`); `hidden` holds the teacher's states of all boundaries.

    Steps that `journal` has are taken from it. Gradients are left in folders beside `hidden`, for a run that goes on.
    """
    journal = journal or Journal.nowhere()
    gradients = [hidden.beside(f"gradients-{draw}", torch.bfloat16) for draw in range(settings.draws)]
    fill_gradients(stream, hidden, gradients, settings.seed, progress, journal)
    teacher = _Teacher(hidden, gradients)
    choices = _measure(inventory, stream, bank, teacher, settings, progress, journal)
    record = _learn_interactions(inventory, stream, bank, teacher, settings, choices, progress, journal)
    return _scores(inventory, bank, settings, choices, record)


def _measure(
    inventory: Inventory,
    stream: BlockStream,
    bank: BankReader,
    teacher: _Teacher,
    settings: LearningSettings,
    progress: Progress,
    journal: Journal,
) -> dict[str, _Choice]:
    choices: dict[str, _Choice] = {}
    partition = teacher.partition(settings.batch_tokens)
    shares = torch.tensor([len(rows) for rows in partition], dtype=torch.float64)
    shares /= shares.sum()

    def measure_block(index: int) -> dict[str, Tensor]:
        learner, _ = _open_block(inventory, stream, bank, index)
        readers = {
            number: partial(teacher.batch, stream, index, rows) for number, rows in journal.team.share(partition)
        }
        grams = journal.team.gather(learner.measure_swaps(readers))
        return {name: torch.stack([of_batch[name] for of_batch in grams]) for name in grams[0]}

    for index in range(stream.blocks):
        progress("measuring", index / stream.blocks)
        found = journal.once(f"measured-{index:04d}", partial(measure_block, index))
        for name, grams in found.items():
            module = inventory.block_prefix(index) + name
            formats = bank.formats(module)
            nbytes = torch.tensor([module_bytes(f) for f in formats], dtype=torch.float64)
            losses = shares @ torch.diagonal(grams, dim1=1, dim2=2)
            choices[module] = _Choice(formats, nbytes, grams, losses, losses.clone())
    progress("measuring", 1.0)
    return choices


def _learn_interactions(
    inventory: Inventory,
    stream: BlockStream,
    bank: BankReader,
    teacher: _Teacher,
    settings: LearningSettings,
    choices: dict[str, _Choice],
    progress: Progress,
    journal: Journal,
) -> dict[str, Any]:
    parameters = sum(c.formats[0].shape[0] * c.formats[0].shape[1] for c in choices.values())
    budget = settings.average_bits * parameters / 8
    all_scores, all_bytes = [c.scores for c in choices.values()], [c.nbytes for c in choices.values()]
    budget = min(
        max(budget, sum(float(n.min()) for n in all_bytes) * 1.001),
        sum(float(n.max()) for n in all_bytes) * 0.999,
    )
    multiplier, temperature = multiplier_of_budget(all_scores, all_bytes, budget, settings.temperature)
    lagrangian = AugmentedLagrangian(multiplier, settings.penalty * multiplier / budget, budget)
    generator = torch.Generator().manual_seed(settings.seed)
    partition = teacher.partition(settings.batch_tokens)
    losses: list[float] = []
    kept = journal.load("learning")
    if kept is not None:
        for name, c in choices.items():
            c.scores.copy_(kept["scores"][name])
            c.samples = kept["samples"][name]
        lagrangian.multiplier, losses = kept["multiplier"], kept["losses"]
        generator.set_state(kept["generator"])
    for visit in range(0 if kept is None else kept["visits"], settings.passes * stream.blocks):
        progress("learning", visit / (settings.passes * stream.blocks))
        index = visit % stream.blocks
        if index == 0:
            losses.append(0.0)
        learner, formats = _open_block(inventory, stream, bank, index)
        here = {name: choices[inventory.block_prefix(index) + name] for name in formats}
        for _ in range(settings.steps):
            price = lagrangian.effective(expected_bytes(all_scores, all_bytes, lagrangian.multiplier, temperature))
            choice = {
                name: sample(probabilities(c.scores, c.nbytes, price, temperature), generator)
                for name, c in here.items()
            }
            drawn = int(torch.randint(len(partition), (1,), generator=generator))
            batch = teacher.batch(stream, index, partition[drawn])
            loss, found = learner.interactions(choice, {name: c.grams[drawn] for name, c in here.items()}, batch)
            losses[-1] += loss / settings.steps
            for name, interaction in found.items():
                here[name].learn(interaction)
        lagrangian.update(expected_bytes(all_scores, all_bytes, lagrangian.multiplier, temperature))
        state = {
            "visits": visit + 1,
            "scores": {name: c.scores for name, c in choices.items()},
            "samples": {name: c.samples for name, c in choices.items()},
            "multiplier": lagrangian.multiplier,
            "losses": losses,
            "generator": generator.get_state(),
        }
        journal.save("learning", state)
    progress("learning", 1.0)
    return {
        "budget_bytes": round(budget),
        "expected_bytes": expected_bytes(all_scores, all_bytes, lagrangian.multiplier, temperature),
        "multiplier": lagrangian.multiplier,
        "temperature": temperature,
        "loss_by_pass": losses,
    }


def _open_block(
    inventory: Inventory, stream: BlockStream, bank: BankReader, index: int
) -> tuple[BlockLearner, dict[str, list[ModuleFormat]]]:
    block = stream.block(index)
    candidates = BlockCandidates(inventory, stream, bank, index, block)
    return BlockLearner(stream, block, candidates), candidates.formats


def _scores(
    inventory: Inventory,
    bank: BankReader,
    settings: LearningSettings,
    choices: dict[str, _Choice],
    record: dict[str, Any],
) -> Scores:
    modules: dict[str, ScoredModule] = {}
    for module in inventory.modules:
        choice = choices.get(module.name)
        if choice is None:
            formats, scores = [ModuleFormat(shape=module.shape, num_bits=16)], [0.0]
        else:
            formats, scores = choice.formats, choice.scores.tolist()
        candidates = [
            Candidate(format=f, nbytes=module_bytes(f), score=s) for f, s in zip(formats, scores, strict=True)
        ]
        modules[module.name] = ScoredModule(fused_group=module.fused_group, candidates=candidates)
    return Scores(
        model=bank.bank.model,
        bank_digest=bank.bank.digest,
        dtype=bank.bank.dtype,
        method="gamma",
        unit=UNIT,
        settings=asdict(settings) | {"outcome": record},
        other_bytes=inventory.other_bytes,
        modules=modules,
    )
