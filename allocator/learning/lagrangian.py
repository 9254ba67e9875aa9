"""Augmented Lagrangian on expected bytes: loss + multiplier * h + penalty/2 * h^2, with h = E[bytes] - budget."""

from dataclasses import dataclass

__all__ = ["AugmentedLagrangian"]


@dataclass
class AugmentedLagrangian:
    """multiplier: loss a byte, never negative; penalty: loss a byte^2; budget_bytes: what expected bytes must meet."""

    multiplier: float
    penalty: float
    budget_bytes: float

    def effective(self, expected_bytes: float) -> float:
        """Derivative of the constraint terms by bytes: what one byte costs the relaxed choice now."""
        return max(0.0, self.multiplier + self.penalty * (expected_bytes - self.budget_bytes))

    def update(self, expected_bytes: float) -> None:
        """Dual ascent (Hestenes 1969, Powell 1969): the multiplier takes over the penalty's slope."""
        self.multiplier = self.effective(expected_bytes)
