"""One decoder block with the candidates of its modules dequantized: measured swaps, and sampled assignments."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from allocator.blocks.stream import BlockStream
from allocator.learning.objective import inner_products, reconstruction_loss

__all__ = ["Batch", "BlockLearner"]


@dataclass(frozen=True)
class Batch:
    """states, teacher: input and output of the original block `[B, T, D]`; gradients: at the output `[S, B, T, D]`."""

    states: Tensor
    teacher: Tensor
    gradients: Tensor

    @property
    def tokens(self) -> int:
        return self.states.shape[0] * self.states.shape[1]


class BlockLearner:
    """Runs one block on the teacher's input and reads what each candidate does to its output.

    candidates: module name inside the block -> the weights of its candidates `[C, N, K]`, the 16-bit one being the
    source's.
    """

    def __init__(self, stream: BlockStream, block: nn.Module, candidates: dict[str, Tensor]) -> None:
        self._stream, self._block, self._candidates = stream, block, candidates
        self._source = {name: block.get_parameter(f"{name}.weight").data for name in candidates}

    def measure_swaps(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Swap each candidate in alone. Returns Gram matrices `[C, C]` of the output errors by module; the diagonal
        is the loss of each single swap."""
        grams = {name: torch.zeros(len(w), len(w), dtype=torch.float64) for name, w in self._candidates.items()}
        tokens = sum(batch.tokens for batch in batches)
        with torch.inference_mode():
            for batch in batches:
                for name, weights in self._candidates.items():
                    outputs = [self._stream.run(self._block, batch.states, {f"{name}.weight": w}) for w in weights]
                    gram = inner_products(torch.stack(outputs) - batch.teacher, batch.gradients)
                    grams[name] += batch.tokens / tokens * gram.cpu()
        return grams

    def marginal_losses(
        self, choice: dict[str, int], grams: dict[str, Tensor], batch: Batch
    ) -> tuple[float, dict[str, Tensor]]:
        """Loss of one sampled assignment, and the loss `[C]` that each candidate of each module adds to the others.

        The straight-through gradient G at the sampled weights gives <G, Q_b - W> = 2 <e_b, e_all> to first order,
        e being output errors. It counts the module's own sampled error b' twice, 2 <e_b, e_b'>, and leaves out the
        candidate's own square <e_b, e_b>, without which a step to few bits looks free. Both are known from the
        measured swaps, so the result keeps the measured part exact and learns what swaps cannot see: interaction.
        """
        weights = {name: self._candidates[name][index].clone().requires_grad_(True) for name, index in choice.items()}
        output = self._stream.run(self._block, batch.states, {f"{name}.weight": w for name, w in weights.items()})
        loss = reconstruction_loss(output, batch.teacher, batch.gradients)
        slopes = torch.autograd.grad(loss, list(weights.values()))
        marginals = {}
        for (name, index), slope in zip(choice.items(), slopes, strict=True):
            gains = self._candidates[name].flatten(1) @ slope.flatten()
            first_order = (gains - (self._source[name] * slope).sum()).double().cpu()
            marginals[name] = first_order - 2 * grams[name][index] + torch.diagonal(grams[name])
        return float(loss.detach()), marginals
