"""Where long work stands: steps known in advance, units done of units, and the time left by what was measured.

Work is given a `Progress` and tells it what it does; who listens decides how it is shown (see `progress_lines`, and
`cli.output` for the terminal). The default, `silent`, ignores it all.
"""

import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import Field

from allocator.contract.documents import Strict

__all__ = ["PlannedStep", "Progress", "Standing", "Tracker", "resident_set_bytes", "silent"]

Item = TypeVar("Item")


class Standing(Strict):
    """Where work stands at one moment. What is not known (yet) is null.

    step, number, steps: what is being done, the how manyth step it is, and how many are known of; then: the names of
    those to come. done, total: units of the step, such as blocks; a part of a unit counts as its share. detail: what is
    at hand inside the unit. elapsed_seconds: since the work began; step_seconds: since the step did.
    step_left_seconds, left_seconds: what is left of the step by its measured speed, and of all steps. resident_bytes:
    memory of the process that does the work.
    """

    step: str
    number: int = Field(ge=1)
    steps: int = Field(ge=1)
    unit: str
    done: float = Field(ge=0)
    total: float = Field(ge=0)
    detail: str = ""
    then: list[str] = Field(default_factory=list)
    elapsed_seconds: float | None = None
    step_seconds: float | None = None
    step_left_seconds: float | None = None
    left_seconds: float | None = None
    resident_bytes: int | None = None

    @property
    def share(self) -> float:
        """Of the step, 0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else 1.0


@dataclass(frozen=True)
class PlannedStep:
    """A step to come. work: its arithmetic, in a unit that the steps of a plan share; 0 if it takes no time to speak
    of, None if that is not known."""

    name: str
    work: float | None = None


class Progress:
    """What work tells. This one ignores it."""

    def plan(self, steps: Sequence[PlannedStep]) -> None:
        """These steps come next, in this order, before what was planned earlier. A step may turn out to be needless."""

    def begin(self, step: str, total: float = 1, unit: str = "") -> None:
        """The step before has ended; `step` has `total` units to do."""

    def advance(self, units: float = 1.0, detail: str = "") -> None:
        """So much more of the step is done; `detail` is at hand next."""

    def reach(self, done: float, detail: str = "") -> None:
        """So much of the step is done in all; nothing, if that is told already."""

    def skip(self, units: float = 1.0) -> None:
        """So much of the step was there already: done, but no sign of how fast work is."""

    def relay(self, standing: Standing) -> None:
        """Work that another process does stands so."""

    def bytes_of(self, step: str) -> Callable[[int, int], None]:
        """What is told bytes done and bytes in all, as a step in MiB."""
        begun: list[bool] = []

        def tell(done: int, total: int) -> None:
            if not begun:
                begun.append(True)
                self.begin(step, total / 2**20, "MiB")
            self.reach(done / 2**20)

        return tell

    def over(self, items: Iterable[Item], step: str, unit: str) -> Iterator[Item]:
        """`items`, as the units of a step."""
        listed = list(items)
        self.begin(step, len(listed), unit)
        for done, item in enumerate(listed):
            yield item
            self.reach(done + 1)


silent = Progress()


class Tracker(Progress):
    """Keeps where the work stands, for one thread that works and others that ask; `listen` is called at each change.

    The speed of a step is that of the units since its first one, which is dearer (imports, caches, compilation) and
    counts only as long as there is no other. The time of steps to come is their planned arithmetic at the speed of what
    is done.
    """

    def __init__(
        self, listen: Callable[[Standing], None] = lambda _: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._listen, self._clock, self._lock = listen, clock, threading.RLock()
        self._start = clock()
        self._coming: list[PlannedStep] = []
        self._number = 0
        self._now: _Step | None = None
        self._relayed: Standing | None = None
        self._work = self._work_seconds = 0.0

    def plan(self, steps: Sequence[PlannedStep]) -> None:
        with self._lock:
            self._coming = [*steps, *self._coming]

    def begin(self, step: str, total: float = 1, unit: str = "") -> None:
        with self._lock:
            self._end()
            names = [planned.name for planned in self._coming]
            passed = names.index(step) + 1 if step in names else 0
            planned = self._coming[passed - 1] if passed else PlannedStep(step)
            self._coming = self._coming[passed:]
            self._number += max(passed, 1)
            self._now, self._relayed = _Step(planned, total, unit, self._clock()), None
        self._tell()

    def advance(self, units: float = 1.0, detail: str = "") -> None:
        with self._lock:
            if self._now is not None:
                self._now.advance(units, self._clock(), detail)
        self._tell()

    def reach(self, done: float, detail: str = "") -> None:
        with self._lock:
            if self._now is not None:
                self._now.advance(max(done - self._now.done, 0.0), self._clock(), detail)
        self._tell()

    def skip(self, units: float = 1.0) -> None:
        with self._lock:
            if self._now is not None:
                self._now.skip(units, self._clock())
        self._tell()

    def relay(self, standing: Standing) -> None:
        with self._lock:
            self._relayed = standing
        self._tell()

    def standing(self) -> Standing | None:
        """None before the first step."""
        with self._lock:
            now, step = self._clock(), self._now
            if self._relayed is not None:
                return self._relayed
            if step is None:
                return None
            left = step.left_seconds(now)
            return Standing(
                step=step.planned.name,
                number=self._number,
                steps=self._number + len(self._coming),
                unit=step.unit,
                done=round(step.done, 4),
                total=round(step.total, 4),
                detail=step.detail,
                then=[planned.name for planned in self._coming],
                elapsed_seconds=round(now - self._start, 1),
                step_seconds=round(now - step.start, 1),
                step_left_seconds=None if left is None else round(left, 1),
                left_seconds=self._left(left),
                resident_bytes=resident_set_bytes(),
            )

    def _left(self, of_step: float | None) -> float | None:
        """Seconds left of all steps, where the arithmetic of all that come is known and any of it has been timed."""
        works = [planned.work for planned in self._coming]
        if of_step is None or None in works:
            return None
        if not works:
            return round(of_step, 1)
        done, seconds = self._timed()
        return round(of_step + sum(work or 0.0 for work in works) * seconds / done, 1) if done else None

    def _timed(self) -> tuple[float, float]:
        """Arithmetic that was done, and the seconds it took."""
        done, seconds = self._work, self._work_seconds
        step = self._now
        if step is not None and step.planned.work and step.total and (speed := step.seconds_a_unit()) is not None:
            done += step.planned.work * step.fresh / step.total
            seconds += speed * step.fresh
        return done, seconds

    def _end(self) -> None:
        self._work, self._work_seconds = self._timed()
        self._now = None

    def _tell(self) -> None:
        standing = self.standing()
        if standing is not None:
            self._listen(standing)


class _Step:
    """One step while it goes on. `fresh` units were done by work, the others were there before."""

    def __init__(self, planned: PlannedStep, total: float, unit: str, start: float) -> None:
        self.planned, self.total, self.unit, self.start = planned, total, unit, start
        self.done = self.fresh = 0.0
        self.detail = ""
        self._worked_since = self._last = start
        self._first: tuple[float, float] | None = None
        """Moment and fresh units when the first unit was whole."""

    def advance(self, units: float, now: float, detail: str) -> None:
        self.done, self.fresh, self.detail = self.done + units, self.fresh + units, detail
        if units:
            self._last = now
        if self._first is None and self.fresh > 1 - 1e-6:
            self._first = now, self.fresh

    def skip(self, units: float, now: float) -> None:
        self.done += units
        if not self.fresh:
            self._worked_since = self._last = now

    def seconds_a_unit(self) -> float | None:
        """None until a unit is whole."""
        if self._first is None:
            return None
        moment, units = self._first
        if self.fresh - units > 1 - 1e-6:
            return (self._last - moment) / (self.fresh - units)
        return (self._last - self._worked_since) / self.fresh

    def left_seconds(self, now: float) -> float | None:
        if self.done >= self.total - 1e-6:
            return 0.0
        speed = self.seconds_a_unit()
        if speed is None:
            return None
        # The unit at hand has had its time since the last word, but no more than a unit takes.
        return max(speed * (self.total - self.done) - min(now - self._last, speed), 0.0)


def resident_set_bytes() -> int:
    """Memory of this process that is in RAM; where that cannot be read, the most it ever was."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
