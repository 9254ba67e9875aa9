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

__all__ = ["UNIT", "correlations", "errors_along", "losses_of_errors"]

UNIT = "nats of KL divergence a token, to second order, of each block's error on the original model's input"


def errors_along(output: Tensor, teacher: Tensor, gradients: Tensor) -> Tensor:
    """The error of an output along each gradient, g . (output - teacher): `[S * B * T]`.

    output, teacher: `[B, T, D]`; gradients: `[S, B, T, D]`, of S draws (see `blocks.gradients`).
    """
    return torch.einsum("btd,sbtd->sbt", output - teacher, gradients).flatten()


def losses_of_errors(errors: Tensor) -> Tensor:
    """Mean of (g . e)^2 / 2 of errors `[C, n]` as `errors_along` gives them: `[C]`, float64."""
    return errors.double().square().mean(1) / 2


def correlations(errors: Tensor) -> Tensor:
    """Correlation matrix `[C, C]`, float32, of errors `[C, n]`: the mean of z_i z_j by the roots of those of z_i^2."""
    errors = errors.float()
    scaled = errors / errors.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
    return scaled @ scaled.T / errors.shape[1]
