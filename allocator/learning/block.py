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
        """Swap each candidate in alone. Returns Gram matrices of the output errors by module, one a batch:
        `[batches, C, C]`; a diagonal holds the losses of the single swaps."""
        grams: dict[str, Tensor] = {}
        with torch.inference_mode():
            for name, weights in self._candidates.items():
                of_batches = []
                for batch in batches:
                    outputs = [self._stream.run(self._block, batch.states, {f"{name}.weight": w}) for w in weights]
                    of_batches.append(inner_products(torch.stack(outputs) - batch.teacher, batch.gradients).cpu())
                grams[name] = torch.stack(of_batches)
        return grams

    def interactions(
        self, choice: dict[str, int], grams: dict[str, Tensor], batch: Batch
    ) -> tuple[float, dict[str, Tensor]]:
        """Loss of one sampled assignment, and by module what each candidate's error and the other modules' errors
        add to each other's loss: `[C]`. `grams` are those of the same batch, `[C, C]`.

        The straight-through gradient G at the sampled weights gives <G, Q_b - W> = 2 <e_b, e_all> to first order,
        e being output errors. It counts the module's own sampled error b' as well, 2 <e_b, e_b'>, which is known from
        the measured swaps and taken off. The candidate's own square <e_b, e_b>, to which the gradient is blind (a
        step to few bits looks free to it), is no part of the interaction: it is measured.
        """
        weights = {name: self._candidates[name][index].clone().requires_grad_(True) for name, index in choice.items()}
        output = self._stream.run(self._block, batch.states, {f"{name}.weight": w for name, w in weights.items()})
        loss = reconstruction_loss(output, batch.teacher, batch.gradients)
        slopes = torch.autograd.grad(loss, list(weights.values()))
        found = {}
        for (name, index), slope in zip(choice.items(), slopes, strict=True):
            gains = self._candidates[name].flatten(1) @ slope.flatten()
            first_order = (gains - (self._source[name] * slope).sum()).double().cpu()
            found[name] = first_order - 2 * grams[name][index]
        return float(loss.detach()), found
