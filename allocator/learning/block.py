"""One decoder block with the candidates of its modules dequantized: measured swaps, and sampled assignments."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from allocator.blocks.stream import BlockStream
from allocator.learning.objective import inner_products, reconstruction_loss

__all__ = ["BlockLearner"]


class BlockLearner:
    """Runs one block on the teacher's input and reads what each candidate does to its output.

    candidates: module name inside the block -> the weights of its candidates `[C, N, K]`, the 16-bit one being the
    source's; weight: what a unit of the block's reconstruction loss counts (see `block_weights`).
    """

    def __init__(self, stream: BlockStream, block: nn.Module, candidates: dict[str, Tensor], weight: float) -> None:
        self._stream, self._block, self._candidates, self._weight = stream, block, candidates, weight
        self._source = {name: block.get_parameter(f"{name}.weight").data for name in candidates}

    def measure_swaps(self, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Swap each candidate in alone. batches: (input, teacher output). Returns Gram matrices `[C, C]` of the
        output errors by module; the diagonal is the loss of each single swap."""
        grams = {name: torch.zeros(len(w), len(w), dtype=torch.float64) for name, w in self._candidates.items()}
        tokens = sum(x.shape[0] * x.shape[1] for x, _ in batches)
        with torch.inference_mode():
            for hidden, teacher in batches:
                share = hidden.shape[0] * hidden.shape[1] / tokens
                for name, weights in self._candidates.items():
                    errors = torch.stack(
                        [self._stream.run(self._block, hidden, {f"{name}.weight": w}) - teacher for w in weights]
                    )
                    grams[name] += self._weight * share * inner_products(errors, teacher).cpu()
        return grams

    def marginal_losses(
        self, choice: dict[str, int], grams: dict[str, Tensor], hidden: Tensor, teacher: Tensor
    ) -> tuple[float, dict[str, Tensor]]:
        """Loss of one sampled assignment, and the loss `[C]` that each candidate of each module adds to the others.

        The straight-through gradient G at the sampled weights gives <G, Q_b - W> = 2 <e_b, e_all> to first order,
        e being output errors. It counts the module's own sampled error b' twice, 2 <e_b, e_b'>, and leaves out the
        candidate's own square <e_b, e_b>, without which a step to few bits looks free. Both are known from the
        measured swaps, so the result keeps the measured part exact and learns what swaps cannot see: interaction.
        """
        weights = {name: self._candidates[name][index].clone().requires_grad_(True) for name, index in choice.items()}
        output = self._stream.run(self._block, hidden, {f"{name}.weight": w for name, w in weights.items()})
        loss = self._weight * reconstruction_loss(output, teacher)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        marginals = {}
        for (name, index), gradient in zip(choice.items(), gradients, strict=True):
            candidates = self._candidates[name]
            slopes = candidates.flatten(1) @ gradient.flatten()
            first_order = (slopes - (self._source[name] * gradient).sum()).double().cpu()
            gram = grams[name]
            marginals[name] = first_order - 2 * gram[index] + torch.diagonal(gram)
        return float(loss.detach()), marginals
