"""The settings of stage I, recorded in the scores."""

from dataclasses import dataclass

__all__ = ["LearningSettings"]


@dataclass(frozen=True)
class LearningSettings:
    """average_bits: the training budget, over quantizable modules, scales and zero points included.

    passes: visits to each block; steps: hard samples drawn at each visit; batch_tokens: tokens of one step;
    temperature: of the relaxation, in units of what one bit of an average module is worth at the budget;
    penalty: of the augmented Lagrangian, relative to its first multiplier, per relative overshoot of 100 %;
    draws: gradients a position that the objective is measured with (see `objective`).
    """

    average_bits: float = 3.0
    passes: int = 4
    steps: int = 16
    batch_tokens: int = 2048
    temperature: float = 0.5
    penalty: float = 2.0
    draws: int = 4
    seed: int = 0
