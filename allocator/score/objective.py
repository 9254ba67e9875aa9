"""The objective of one block: what the error of its output does to the model's predictions, to second order.

A block is given the teacher's hidden state and must give the teacher's output (teacher forcing). How much an error e
of its output matters depends on its size and on its direction. To second order the KL divergence of the final
distribution is e^T F e / 2, F being the Fisher matrix of the output, which is the mean of g g^T over random gradients g
of the log-probabilities (see `blocks.gradients`). A few such probes measure the error in nats; positions are taken as
independent. On single swaps this tracks the measured KL of the whole model far closer than the error's size does.

The gradients at all blocks' outputs are those of one and the same probe. So g . e is, for an error in any block, the
change of one and the same quantity, and the mean of (g . e) (g' . e') over probes is what errors of two different
blocks do to the KL together: pairs of modules anywhere in the model are had from the measurements of single ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "UNIT",
    "UNIT_OF_DIRECTIONS",
    "Kinds",
    "correlations",
    "errors_along",
    "gram_matrix",
    "losses_of_errors",
    "reconstruction_loss",
]

UNIT = "nats of KL divergence a token, to second order, of each block's error on the original model's input"
UNIT_OF_DIRECTIONS = "1 - cosine of a token's last state, to second order, of each block's error on the original input"
"""Of an embedding model."""


@dataclass(frozen=True)
class Kinds:
    """What tells the classes of pairs of candidates apart: numbers of module, block and width of each, int64 `[C]`."""

    modules: Tensor
    blocks: Tensor
    widths: Tensor

    def of_pairs(self) -> Tensor:
        """The class of each pair, int64 `[C, C]`, symmetric."""
        one_module, one_block = (of[:, None] == of[None, :] for of in (self.modules, self.blocks))
        narrow = torch.minimum(self.widths[:, None], self.widths[None, :])
        wide = torch.maximum(self.widths[:, None], self.widths[None, :])
        together = one_module.long() + (one_module | one_block)
        return (narrow * (int(self.widths.max()) + 1) + wide) * 3 + together


def errors_along(output: Tensor, teacher: Tensor, gradients: Tensor) -> Tensor:
    """The error of an output along each gradient, g . (output - teacher): `[B * S * T]`, so that a part of the numbers
    is a part of the text.

    output, teacher: `[B, T, D]`; gradients: `[S, B, T, D]`, of S probes (see `blocks.gradients`).
    """
    return torch.einsum("btd,sbtd->bst", output - teacher, gradients).flatten()


def losses_of_errors(errors: Tensor) -> Tensor:
    """Mean of (g . e)^2 / 2 of errors `[C, n]` as `errors_along` gives them: `[C]`, float64."""
    return errors.double().square().mean(1) / 2


def correlations(errors: Tensor, kinds: Kinds, parts: int = 16) -> Tensor:
    """Correlation matrix `[C, C]`, float32, of errors `[C, n]` scaled to a mean square of 1, less what chance makes.

    Errors of most modules are independent, so an optimiser would look for those pairs whose estimate happens to be
    negative. How much of the estimates is chance is known of many pairs together, not of one: pairs of a class (the
    two widths; in one module, in one block, in two) are shrunk by the share of their mean square that is not noise.
    The noise is the variance of the mean over `parts` of the text (parametric empirical Bayes, Efron and Morris 1973).
    """
    pieces = torch.tensor_split(errors, parts, 1)
    total = torch.zeros(errors.shape[0], errors.shape[0])
    squares = torch.zeros_like(total)
    for piece in pieces:
        products = piece.float() @ piece.float().T / max(1, piece.shape[1])
        total += products
        squares += products.square()
    mean = total / parts
    noise = (squares / parts - mean.square()).clamp_min(0) / (parts - 1)
    label = kinds.of_pairs().flatten()
    size = int(label.max()) + 1
    signal, chance = (torch.bincount(label, values.double().flatten(), size) for values in (mean.square(), noise))
    share = (1 - chance / signal.clamp_min(1e-300)).clamp(0, 1).float()
    return (mean * share[label].view_as(mean)).fill_diagonal_(1.0)


def gram_matrix(errors: Tensor) -> Tensor:
    """Gram matrix `[C, C]`, float64, of errors `[C, n]` in the metric of the loss: its diagonal holds the losses."""
    projected = errors.double()
    gram: Tensor = projected @ projected.T / (2 * projected.shape[1])
    return gram


def reconstruction_loss(output: Tensor, teacher: Tensor, gradients: Tensor) -> Tensor:
    """Loss of an output, with a gradient of its own; shapes as in `errors_along`."""
    return (gradients * (output - teacher)).sum(-1).square().mean() / 2
