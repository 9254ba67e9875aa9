"""How much time good candidates are worth: levels with a name, in the place of a quantizer and its settings."""

from dataclasses import dataclass

__all__ = ["DEFAULT_EFFORT", "EFFORTS", "Effort"]


@dataclass(frozen=True)
class Effort:
    """quantizer: of the candidates; tune: whether those that are chosen are learned anew for the assignment."""

    quantizer: str
    tune: bool = False


EFFORTS = {
    "fast": Effort("gptq"),
    "thorough": Effort("kfac"),
    "best": Effort("kfac", tune=True),
}
"""What each costs, and what it brings, is measured in docs/scale.md."""

DEFAULT_EFFORT = "thorough"
