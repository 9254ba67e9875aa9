"""The loop of stage I: measure single swaps in every block, then learn what the modules do to each other.

The relaxed objective F(p) = E_p[loss] + multiplier * E_p[bytes] - T H(p) is minimised over independent choices by
its natural gradient, which is marginal loss minus score: each step moves every score of the visited block towards
the marginal losses at one hard Gumbel sample, which are the measured loss and the sampled interaction. Under teacher
forcing blocks are coupled by the budget alone, so one block is resident at a time.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from allocator.blocks.gradients import fill_gradients
from allocator.blocks.hidden import HiddenStates
from allocator.blocks.stream import BlockStream
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
        return Batch(states, teacher, gradients.to(stream.device))

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
) -> Scores:
    """Scores of every candidate (`objective.UNIT`); `hidden` holds the teacher's states of all boundaries."""
    gradients = [hidden.beside(f"gradients-{draw}") for draw in range(settings.draws)]
    try:
        fill_gradients(stream, hidden, gradients, settings.seed, progress)
        teacher = _Teacher(hidden, gradients)
        choices = _measure(inventory, stream, bank, teacher, settings, progress)
        record = _learn_interactions(inventory, stream, bank, teacher, settings, choices, progress)
    finally:
        for store in gradients:
            store.remove()
    return _scores(inventory, bank, settings, choices, record)


def _measure(
    inventory: Inventory,
    stream: BlockStream,
    bank: BankReader,
    teacher: _Teacher,
    settings: LearningSettings,
    progress: Progress,
) -> dict[str, _Choice]:
    choices: dict[str, _Choice] = {}
    for index in range(stream.blocks):
        progress("measuring", index / stream.blocks)
        learner, formats = _open_block(inventory, stream, bank, index)
        batches = [teacher.batch(stream, index, rows) for rows in teacher.partition(settings.batch_tokens)]
        shares = torch.tensor([batch.tokens for batch in batches], dtype=torch.float64)
        shares /= shares.sum()
        for name, grams in learner.measure_swaps(batches).items():
            nbytes = torch.tensor([module_bytes(f) for f in formats[name]], dtype=torch.float64)
            losses = shares @ torch.diagonal(grams, dim1=1, dim2=2)
            choices[inventory.block_prefix(index) + name] = _Choice(
                formats[name], nbytes, grams, losses, losses.clone()
            )
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
    for visit in range(settings.passes * stream.blocks):
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
    prefix = inventory.block_prefix(index)
    formats: dict[str, list[ModuleFormat]] = {}
    candidates: dict[str, Tensor] = {}
    for module in inventory.modules:
        if module.block != index or module.name not in bank.bank.modules:
            continue
        name = module.name.removeprefix(prefix)
        source = block.get_parameter(f"{name}.weight").data
        stored = bank.bank.modules[module.name].candidates
        formats[name] = [*stored, ModuleFormat(shape=module.shape, num_bits=16)]
        quantized = [bank.dequantized(module.name, f).to(source.device) for f in stored]
        candidates[name] = torch.stack([*quantized, source])
    return BlockLearner(stream, block, candidates), formats


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
