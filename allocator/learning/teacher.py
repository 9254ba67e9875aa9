"""What the original model did on the calibration text: its states and, draw by draw, its gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from allocator.blocks.hidden import HiddenStates
from allocator.blocks.stream import BlockStream
from allocator.learning.block import Batch

__all__ = ["Teacher"]


@dataclass(frozen=True)
class Teacher:
    """hidden: states of all boundaries; gradients: one store a draw, of boundaries 0 .. blocks."""

    hidden: HiddenStates
    gradients: list[HiddenStates]

    @classmethod
    def over(cls, hidden: HiddenStates, draws: int) -> "Teacher":
        """With stores for gradients in folders beside `hidden`: `blocks.gradients` fills them."""
        return cls(hidden, [hidden.beside(f"gradients-{draw}", torch.bfloat16) for draw in range(draws)])

    def batch(self, stream: BlockStream, index: int, rows: Tensor) -> Batch:
        """Input, output and output gradients of block `index` for some sequences."""
        states, teacher = (self.hidden.boundary(i)[rows].to(stream.device) for i in (index, index + 1))
        return Batch(states, teacher, self.gradients_at(stream, index + 1, rows))

    def gradients_at(self, stream: BlockStream, boundary: int, rows: Tensor) -> Tensor:
        """Gradients of all draws at a boundary, `[S, B, T, D]`, float32."""
        gradients = torch.stack([g.boundary(boundary)[rows] for g in self.gradients])
        return gradients.to(stream.device).float()

    def partition(self, tokens: int) -> list[Tensor]:
        """All sequences, cut into batches of about `tokens` tokens."""
        return list(torch.split(torch.arange(self.hidden.shape[0]), max(1, tokens // self.hidden.shape[1])))
