"""The relaxed choice: widths drawn with Gumbel noise from p = softmax(-(score + multiplier * bytes) / T).

The multiplier's tilt is explicit, so the scores themselves are losses and need no de-tilting: at the optimum of
the entropy-regularised problem, log p = -(marginal loss + multiplier * bytes) / T + const.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["expected_bytes", "multiplier_of_budget", "probabilities", "sample"]


def probabilities(scores: Tensor, nbytes: Tensor, multiplier: float, temperature: float) -> Tensor:
    """p `[C]` of one module; scores in loss, nbytes of its candidates, multiplier in loss a byte."""
    return torch.softmax(-(scores + multiplier * nbytes) / temperature, dim=-1)


def sample(probability: Tensor, generator: torch.Generator) -> int:
    """A hard sample by the Gumbel-max trick (Jang et al. 2017)."""
    uniform = torch.rand(probability.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    return int((probability.clamp_min(1e-300).log() - (-uniform.log()).log()).argmax())


def expected_bytes(scores: Sequence[Tensor], nbytes: Sequence[Tensor], multiplier: float, temperature: float) -> float:
    """Sum over modules of the expected bytes under `probabilities`."""
    pairs = zip(scores, nbytes, strict=True)
    return sum(float((probabilities(s, n, multiplier, temperature) * n).sum()) for s, n in pairs)


def multiplier_of_budget(
    scores: Sequence[Tensor], nbytes: Sequence[Tensor], budget_bytes: float, sharpness: float
) -> tuple[float, float]:
    """The multiplier at which the expected bytes meet the budget, and the temperature that goes with it.

    The temperature is `sharpness` times what one bit of an average module is worth: multiplier * mean bytes a bit.
    """
    bytes_a_bit = sum(float(n.max()) for n in nbytes) / len(nbytes) / 16
    low, high = 1e-30, 1e10
    for _ in range(200):
        middle = (low * high) ** 0.5
        temperature = sharpness * middle * bytes_a_bit
        if expected_bytes(scores, nbytes, middle, temperature) > budget_bytes:
            low = middle
        else:
            high = middle
    return high, sharpness * high * bytes_a_bit
