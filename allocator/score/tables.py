"""What a method finds, and the scores file that it becomes."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from allocator.contract.layout import ModuleFormat, module_bytes
from allocator.contract.scores import Candidate, Interactions, ScoredModule, Scores
from allocator.model import Inventory
from allocator.quantize.bank_reader import BankReader
from allocator.score.settings import LearningSettings

__all__ = ["Table", "make_scores"]


@dataclass(frozen=True)
class Table:
    """Scores by module name, one a candidate in the bank's order, 16 bits last.

    correlations: of the errors of all candidates below 16 bits, modules in the order of `scores`; see
    `contract.scores.Interactions`. outcome: what the method wants recorded.
    """

    scores: dict[str, Tensor]
    unit: str
    correlations: Tensor | None = None
    outcome: dict[str, Any] = field(default_factory=dict)


def make_scores(inventory: Inventory, bank: BankReader, settings: LearningSettings, table: Table) -> Scores:
    """The scores of every module of the model; those that `table` does not have keep 16 bits."""
    modules: dict[str, ScoredModule] = {}
    for module in inventory.modules:
        found = table.scores.get(module.name)
        formats = [ModuleFormat(shape=module.shape, num_bits=16)] if found is None else bank.formats(module.name)
        values = [0.0] if found is None else found.tolist()
        candidates = [
            Candidate(format=f, nbytes=module_bytes(f), score=s) for f, s in zip(formats, values, strict=True)
        ]
        modules[module.name] = ScoredModule(fused_group=module.fused_group, candidates=candidates)
    return Scores(
        model=bank.bank.model,
        bank_digest=bank.bank.digest,
        dtype=bank.bank.dtype,
        method=settings.method,
        unit=table.unit,
        settings=asdict(settings) | {"outcome": table.outcome},
        other_bytes=inventory.other_bytes,
        predicting_bytes=inventory.predicting_bytes,
        channel_blocks=None if bank.bank.channel_order is None else bank.bank.channel_order.layout,
        modules=modules,
        interactions=None if table.correlations is None else _interactions(bank, table),
    )


def _interactions(bank: BankReader, table: Table) -> Interactions:
    assert table.correlations is not None
    owner = torch.cat([torch.full((len(bank.formats(name)) - 1,), number) for number, name in enumerate(table.scores)])
    stored = table.correlations.half().clamp(-1, 1)
    between = torch.where(owner[:, None] == owner[None, :], 0.0, stored.double())
    between += between.T.clone()
    between = between / 2 + torch.eye(len(owner), dtype=torch.float64)
    least = float(torch.linalg.eigvalsh(between)[0])
    return Interactions.of(stored.numpy(), least)
