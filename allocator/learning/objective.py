"""The objective of one block: how far its output is from the teacher's, on the teacher's input."""

from torch import Tensor

__all__ = ["UNIT", "inner_products", "reconstruction_loss"]

UNIT = "nats of KL divergence a token: relative squared error of each block's output times the block's measured weight"


def reconstruction_loss(output: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of ||output - teacher||^2 / ||teacher||^2; both `[B, T, D]`.

    Relative by token, since the RMS norm that reads the state next divides each token by its own size.
    """
    return ((output - teacher).square().sum(-1) / teacher.square().sum(-1)).mean()


def inner_products(errors: Tensor, teacher: Tensor) -> Tensor:
    """Gram matrix of output errors `[C, B, T, D]` in the metric of `reconstruction_loss`: `[C, C]`.

    Its diagonal holds the losses of the C errors.
    """
    scaled = errors / teacher.norm(dim=-1, keepdim=True)
    flat = scaled.flatten(1).double()
    gram: Tensor = flat @ flat.T / (teacher.shape[0] * teacher.shape[1])
    return gram
