"""What the original model did on the calibration text: its states and, probe by probe, its gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from allocator.blocks.hidden_states import HiddenStates
from allocator.blocks.stream import BlockStream
from allocator.score.swapped_block import Batch

__all__ = ["Teacher"]


@dataclass(frozen=True)
class Teacher:
    """hidden: states of all boundaries; gradients: one store a probe, of boundaries 0 .. blocks."""

    hidden: HiddenStates
    gradients: list[HiddenStates]

    @classmethod
    def over(cls, hidden: HiddenStates, probes: int) -> "Teacher":
        """With stores for gradients in folders beside `hidden`: `blocks.gradients` fills them."""
        return cls(hidden, [hidden.beside(f"gradients-{probe}", torch.bfloat16) for probe in range(probes)])

    def batch(self, stream: BlockStream, index: int, rows: Tensor) -> Batch:
        """Input, output and output gradients of block `index` for some sequences."""
        states, teacher = (self.hidden.boundary(i)[rows].to(stream.device) for i in (index, index + 1))
        return Batch(states, teacher, self.gradients_at(stream, index + 1, rows))

    def gradients_at(self, stream: BlockStream, boundary: int, rows: Tensor) -> Tensor:
        """Gradients of all probes at a boundary, `[S, B, T, D]`, float32."""
        gradients = torch.stack([g.boundary(boundary)[rows] for g in self.gradients])
        return gradients.to(stream.device).float()

    def partition(self, tokens: int) -> list[Tensor]:
        """All sequences, cut into batches of about `tokens` tokens."""
        return list(torch.split(torch.arange(self.hidden.shape[0]), max(1, tokens // self.hidden.shape[1])))
