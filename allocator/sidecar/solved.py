"""What a solver process answers to the service."""

from dataclasses import dataclass

__all__ = ["Solved"]


@dataclass(frozen=True)
class Solved:
    """An allocation and its manifest as they are answered and stored, and what the metrics want to know."""

    allocation: bytes
    manifest: bytes
    seconds: float
    gap_ratio: float
    cut: bool
