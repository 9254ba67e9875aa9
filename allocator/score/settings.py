"""The settings of stage I, recorded in the scores."""

from dataclasses import dataclass

__all__ = ["LearningSettings"]


@dataclass(frozen=True)
class LearningSettings:
    """method: which of `methods` gives the scores; batch_tokens: tokens that are run at once; draws: gradients a
    position that losses are measured with (see `objective`); pair_samples: of a candidate's errors along those
    gradients, how many are kept to correlate it with the candidates of other modules; average_bits: the budget that the
    method `relaxed` learns at, over quantizable modules, scales and zero points included.
    """

    method: str = "gamma"
    batch_tokens: int = 2048
    draws: int = 8
    pair_samples: int = 262_144
    average_bits: float = 3.0
    seed: int = 0
