"""One decoder block with the candidates of its modules: measured swaps, and sampled assignments."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from allocator.blocks.stream import BlockStream
from allocator.candidates.block import BlockCandidates
from allocator.learning.objective import errors_along, gram_matrix, reconstruction_loss

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
    """Runs one block on the teacher's input and reads what each of its candidates does to its output."""

    def __init__(self, stream: BlockStream, block: nn.Module, candidates: BlockCandidates) -> None:
        self._stream, self._block, self._candidates = stream, block, candidates

    def measure_swaps(self, batches: Mapping[int, Callable[[], Batch]]) -> dict[int, dict[str, Tensor]]:
        """Swap each candidate in alone. Returns for each of `batches`, by module, the Gram matrix of the output errors
        `[C, C]`; a diagonal holds the losses of the single swaps.

        Batches are read anew for each candidate, and of an output only its error along the gradients is kept: one
        candidate and one batch are in memory at a time.
        """
        grams: dict[int, dict[str, Tensor]] = {number: {} for number in batches}
        with torch.inference_mode():
            for name, formats in self._candidates.formats.items():
                errors: dict[int, list[Tensor]] = {number: [] for number in batches}
                for index in range(len(formats)):
                    weight = self._candidates.weight(name, index)
                    for number, read in batches.items():
                        batch = read()
                        output = self._stream.run(self._block, batch.states, {f"{name}.weight": weight})
                        errors[number].append(errors_along(output, batch.teacher, batch.gradients).cpu())
                for number, of_candidates in errors.items():
                    grams[number][name] = gram_matrix(torch.stack(of_candidates))
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
        weights = {
            name: self._candidates.weight(name, index).clone().requires_grad_(True) for name, index in choice.items()
        }
        output = self._stream.run(self._block, batch.states, {f"{name}.weight": w for name, w in weights.items()})
        loss = reconstruction_loss(output, batch.teacher, batch.gradients)
        slopes = torch.autograd.grad(loss, list(weights.values()))
        found = {}
        for (name, index), slope in zip(choice.items(), slopes, strict=True):
            count = len(self._candidates.formats[name])
            gains = torch.stack([(self._candidates.weight(name, i) * slope).sum() for i in range(count)])
            first_order = (gains - (self._candidates.source(name) * slope).sum()).double().cpu()
            found[name] = first_order - 2 * grams[name][index]
        return float(loss.detach()), found
