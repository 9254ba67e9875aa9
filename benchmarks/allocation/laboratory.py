"""One model with its candidates in memory: the budgets, plans and losses that every method of the comparison shares."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from allocator.blocks import BlockStream
from allocator.contract.layout import ModuleFormat, module_bytes
from allocator.contract.scores import Candidate, ScoredModule, Scores
from allocator.evaluate import Losses, Student
from allocator.model import read_inventory
from allocator.quantize import BankReader
from allocator.solve import solve
from allocator.solve.quadratic import interactions_among

__all__ = ["Laboratory"]


class Laboratory:
    """Plans are lists of widths, one a module of `names`; budgets are average bits over the block linears,
    scales and zero points included.

    calibration, held_out: students of the calibration text and of the text that is only reported on.
    """

    def __init__(self, model: Path, bank: Path, calibration: Tensor, held_out: Sequence[Tensor]) -> None:
        self.inventory = read_inventory(model)
        self.stream = BlockStream(self.inventory)
        self.bank = BankReader(bank)
        stored = self.bank.bank.modules
        self.names = [m.name for m in self.inventory.modules if m.name in stored and m.block is not None]
        self.formats = [
            {c.num_bits: c for c in stored[name].candidates}
            | {16: ModuleFormat(shape=self.inventory.module(name).shape, num_bits=16)}
            for name in self.names
        ]
        self.widths = sorted(self.formats[0])
        self.bytes = torch.tensor(
            [[module_bytes(formats[b]) for b in self.widths] for formats in self.formats], dtype=torch.float64
        )
        self.parameters = sum(self.inventory.module(name).parameters for name in self.names)
        self.calibration = Student(self.stream, self.bank, calibration)
        self.held_out = [self.calibration.for_tokens(tokens) for tokens in held_out]

    def block_of(self, name: str) -> int:
        block = self.inventory.module(name).block
        assert block is not None
        return block

    def parameters_by_module(self) -> Tensor:
        return torch.tensor([self.inventory.module(name).parameters for name in self.names], dtype=torch.float64)

    def budget(self, bits: float) -> int:
        """Bytes of all block linears at `bits` average bits."""
        return int(Fraction(repr(bits)) * self.parameters / 8)

    def feasible(self, bits: float) -> bool:
        return self.nbytes([self.widths[0]] * len(self.names)) <= self.budget(bits)

    def nbytes(self, plan: Sequence[int]) -> int:
        return sum(module_bytes(formats[b]) for formats, b in zip(self.formats, plan, strict=True))

    def assignment(self, plan: Sequence[int]) -> dict[str, ModuleFormat]:
        return {name: formats[b] for name, formats, b in zip(self.names, self.formats, plan, strict=True)}

    def solve(self, table: Tensor, bits: float) -> list[int]:
        """The exact program over scores `[modules, widths]`."""
        assignment = solve(self.scores(table), self.budget(bits)).assignment
        return [assignment[name].num_bits for name in self.names]

    def solve_scores(self, scores: Scores, bits: float) -> list[int]:
        """The plan of the product's solver for scores of the whole model, interactions and all."""
        assignment = solve(self.linears_only(scores), self.budget(bits)).assignment
        return [assignment[name].num_bits for name in self.names]

    def linears_only(self, scores: Scores) -> Scores:
        """`scores` of the block linears alone, so that budgets count them alone."""
        modules = {name: scores.modules[name] for name in self.names}
        pairs = interactions_among(scores, self.names)
        return scores.model_copy(update={"modules": modules, "other_bytes": 0, "interactions": pairs})

    def scores(self, table: Tensor) -> Scores:
        """Scores `[modules, widths]` as a document."""
        modules = {}
        for name, formats, row in zip(self.names, self.formats, table.tolist(), strict=True):
            candidates = [
                Candidate(format=formats[b], nbytes=module_bytes(formats[b]), score=score)
                for b, score in zip(self.widths, row, strict=True)
            ]
            modules[name] = ScoredModule(candidates=candidates)
        bank = self.bank.bank
        return Scores(
            model=bank.model, bank_digest=bank.digest, dtype=bank.dtype, method="", unit="", settings={},
            other_bytes=0, modules=modules,
        )  # fmt: skip

    def table(self, scores: Scores) -> Tensor:
        """The scores of the block linears as a table `[modules, widths]`."""
        rows = [
            [c.score for c in sorted(scores.modules[n].candidates, key=lambda c: c.format.num_bits)] for n in self.names
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def uniform(self, bits: float) -> list[int]:
        """The widest uniform plan within the budget."""
        plans = [[b] * len(self.names) for b in self.widths]
        return max((p for p in plans if self.nbytes(p) <= self.budget(bits)), key=self.nbytes)

    def weight_errors(self) -> Tensor:
        """Squared error of every candidate's weights, `[modules, widths]`."""
        table = torch.zeros(len(self.names), len(self.widths), dtype=torch.float64)
        for index in range(self.stream.blocks):
            _, candidates = self.calibration.block(index)
            for local, name in self.calibration.local_names(index).items():
                source = candidates.source(local)
                weights = [candidates.weight(local, i) for i in range(len(candidates.formats[local]))]
                errors = [(weight - source).square().sum(dtype=torch.float64) for weight in weights]
                table[self.names.index(name)] = torch.stack(errors)
        return table

    def report(self, plan: Sequence[int]) -> list[Losses]:
        """Losses on each held-out text."""
        return [student.losses(self.assignment(plan)) for student in self.held_out]
