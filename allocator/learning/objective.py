"""The objective of one block: what the error of its output does to the model's predictions, to second order.

A block is given the teacher's hidden state and must give the teacher's output (teacher forcing). How much an error e
of its output matters depends on its size and on its direction. To second order the KL divergence of the final
distribution is e^T F e / 2, F being the Fisher matrix of the output, which is the mean of g g^T over gradients g of
-log p(y) with y drawn from the model itself. A few such draws measure the error in nats; positions are taken as
independent. On single swaps this tracks the measured KL of the whole model far closer than the error's size does.

The gradients at all blocks' outputs are those of one and the same draw. So g . e is, for an error in any block, the
change of one and the same quantity, and the mean of (g . e) (g' . e') over draws is what errors of two different blocks
do to the KL together: pairs of modules anywhere in the model are had from the measurements of single ones.
"""

import torch
from torch import Tensor

__all__ = ["UNIT", "correlations", "errors_along", "gram_matrix", "losses_of_errors", "reconstruction_loss"]

_DOUBT = 2.0
UNIT = "nats of KL divergence a token, to second order, of each block's error on the original model's input"


def errors_along(output: Tensor, teacher: Tensor, gradients: Tensor) -> Tensor:
    """The error of an output along each gradient, g . (output - teacher): `[S * B * T]`.

    output, teacher: `[B, T, D]`; gradients: `[S, B, T, D]`, of S draws (see `blocks.gradients`).
    """
    return torch.einsum("btd,sbtd->sbt", output - teacher, gradients).flatten()


def losses_of_errors(errors: Tensor) -> Tensor:
    """Mean of (g . e)^2 / 2 of errors `[C, n]` as `errors_along` gives them: `[C]`, float64."""
    return errors.double().square().mean(1) / 2


def correlations(errors: Tensor, parts: int = 16) -> Tensor:
    """Correlation matrix `[C, C]`, float32, of errors `[C, n]` scaled to a mean square of 1, less what chance makes.

    Most pairs have no correlation worth the name, and an optimiser finds those whose estimate happens to be negative.
    So the estimate is made in `parts` of the text, and with v the variance of their mean, r is shrunk to
    r max(0, 1 - 2 v / r^2): nothing is left of what is below 1.4 standard errors (a positive-part James-Stein rule).
    """
    total = torch.zeros(errors.shape[0], errors.shape[0])
    squares = torch.zeros_like(total)
    pieces = torch.chunk(errors, parts, 1)
    for piece in pieces:
        products = piece.float() @ piece.float().T / piece.shape[1]
        total += products
        squares += products.square()
    mean = total / len(pieces)
    if len(pieces) < 2:
        return mean
    variance = (squares / len(pieces) - mean.square()).clamp_min(0) / (len(pieces) - 1)
    shrunk = mean * (1 - _DOUBT * variance / mean.square().clamp_min(1e-30)).clamp(0, 1)
    return shrunk.fill_diagonal_(1.0)


def gram_matrix(errors: Tensor) -> Tensor:
    """Gram matrix `[C, C]`, float64, of errors `[C, n]` in the metric of the loss: its diagonal holds the losses."""
    projected = errors.double()
    gram: Tensor = projected @ projected.T / (2 * projected.shape[1])
    return gram


def reconstruction_loss(output: Tensor, teacher: Tensor, gradients: Tensor) -> Tensor:
    """Loss of an output, with a gradient of its own; shapes as in `errors_along`."""
    return (gradients * (output - teacher)).sum(-1).square().mean() / 2
