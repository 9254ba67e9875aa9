"""What the original model did on the calibration text: its states and, draw by draw, its gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from allocator.blocks.gradients import fill_gradients
from allocator.blocks.hidden import HiddenStates
from allocator.blocks.stream import BlockStream
from allocator.learning.block import Batch
from allocator.progress import Progress
from allocator.running import Journal

__all__ = ["Teacher"]


@dataclass(frozen=True)
class Teacher:
    """hidden: states of all boundaries; gradients: one store a draw, of boundaries 1 .. blocks."""

    hidden: HiddenStates
    gradients: list[HiddenStates]

    @classmethod
    def prepare(
        cls, stream: BlockStream, hidden: HiddenStates, draws: int, seed: int, progress: Progress, journal: Journal
    ) -> "Teacher":
        """Compute the gradients; they are left in folders beside `hidden`, for a run that goes on."""
        gradients = [hidden.beside(f"gradients-{draw}", torch.bfloat16) for draw in range(draws)]
        fill_gradients(stream, hidden, gradients, seed, progress, journal)
        return cls(hidden, gradients)

    def batch(self, stream: BlockStream, index: int, rows: Tensor) -> Batch:
        """Input, output and output gradients of block `index` for some sequences."""
        states, teacher = (self.hidden.boundary(i)[rows].to(stream.device) for i in (index, index + 1))
        gradients = torch.stack([g.boundary(index + 1)[rows] for g in self.gradients])
        return Batch(states, teacher, gradients.to(stream.device).float())

    def partition(self, tokens: int) -> list[Tensor]:
        """All sequences, cut into batches of about `tokens` tokens."""
        return list(torch.split(torch.arange(self.hidden.shape[0]), max(1, tokens // self.hidden.shape[1])))
