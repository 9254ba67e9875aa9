"""How long work tells what it does: one call a step, shown by the command line, ignored by default."""

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0..1."""


def silent(_what: str, _share: float) -> None:
    """Shows nothing."""
