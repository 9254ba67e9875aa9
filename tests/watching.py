"""Progress that a test sees, and may end the work from by raising."""

from collections.abc import Callable

from allocator.run.progress import Progress

__all__ = ["Watching"]


class Watching(Progress):
    """Calls `see(step, share of it that is done)` at each change."""

    def __init__(self, see: Callable[[str, float], None]) -> None:
        self._see, self._step, self._done, self._total = see, "", 0.0, 1.0

    def begin(self, step: str, total: float = 1, unit: str = "") -> None:
        self._step, self._total = step, total
        self.reach(0)

    def advance(self, units: float = 1.0, detail: str = "") -> None:
        self.reach(self._done + units)

    def reach(self, done: float, detail: str = "") -> None:
        self._done = done
        self._see(self._step, done / self._total if self._total else 1.0)

    def skip(self, units: float = 1.0) -> None:
        self.reach(self._done + units)
