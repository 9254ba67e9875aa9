"""The objective of one block: what the error of its output does to the model's predictions, to second order.

A block is given the teacher's hidden state and must give the teacher's output (teacher forcing). How much an error e
of its output matters depends on its size and on its direction. To second order the KL divergence of the final
distribution is e^T F e / 2, F being the Fisher matrix of the output, which is the mean of g g^T over gradients g of
-log p(y) with y drawn from the model itself. A few such draws measure the error in nats; positions are taken as
independent. On single swaps this tracks the measured KL of the whole model far closer than the error's size does.
"""

import torch
from torch import Tensor

__all__ = ["UNIT", "errors_along", "gram_matrix", "reconstruction_loss"]

UNIT = "nats of KL divergence a token, to second order, of each block's error on the original model's input"


def reconstruction_loss(output: Tensor, teacher: Tensor, gradients: Tensor) -> Tensor:
    """Mean over tokens and draws of (g . (output - teacher))^2 / 2.

    output, teacher: `[B, T, D]`; gradients: `[S, B, T, D]`, of S draws (see `blocks.gradients`).
    """
    return (gradients * (output - teacher)).sum(-1).square().mean() / 2


def errors_along(output: Tensor, teacher: Tensor, gradients: Tensor) -> Tensor:
    """The error of an output along each gradient, g . (output - teacher): `[S * B * T]`, shapes as above."""
    return torch.einsum("btd,sbtd->sbt", output - teacher, gradients).flatten()


def gram_matrix(errors: Tensor) -> Tensor:
    """Gram matrix `[C, C]` of output errors, given as `errors_along` `[C, n]`, in the metric of `reconstruction_loss`.

    Its diagonal holds the losses of the C errors.
    """
    projected = errors.double()
    gram: Tensor = projected @ projected.T / (2 * projected.shape[1])
    return gram
