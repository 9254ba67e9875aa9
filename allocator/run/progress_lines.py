"""Progress as lines of text or JSON: for logs, and for programs that read what another one does."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from allocator.run.progress import Standing, Tracker

__all__ = [
    "EVERY_SECONDS",
    "ProgressLines",
    "amount_done",
    "duration",
    "json_line",
    "keep_telling",
    "left",
    "standing_of",
    "text_line",
]

EVERY_SECONDS = 30.0
_PULSE_SECONDS = 0.5


class ProgressLines:
    """Writes a line when a step begins, when its first unit is done (that is when the time left is known), and whenever
    `every` seconds of `clock` went by without one.

    `tracker` is what the work is to be given. `tick` is to be called now and then, so that work inside one long unit
    is told of too (see `keep_telling`).
    """

    def __init__(
        self,
        write: Callable[[str], None],
        form: Callable[[Standing], str],
        every: float = EVERY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write, self._form, self._every, self._clock = write, form, every, clock
        self._lock = threading.RLock()
        self._last = clock()
        self._step: tuple[str, int] | None = None
        self._told_time = False
        self.tracker = Tracker(self._changed, clock)

    def tick(self) -> None:
        """Write a line if none was written for so long."""
        standing = self.tracker.standing()
        if standing is not None:
            with self._lock:
                self._write_if_due(standing)

    def _changed(self, standing: Standing) -> None:
        with self._lock:
            if self._step != (standing.step, standing.number):
                self._step, self._told_time = (standing.step, standing.number), False
                self._put(standing)
            elif not self._told_time and (standing.step_left_seconds or 0) >= self._every:
                self._put(standing)
            else:
                self._write_if_due(standing)

    def _write_if_due(self, standing: Standing) -> None:
        if self._clock() - self._last >= self._every:
            self._put(standing)

    def _put(self, standing: Standing) -> None:
        self._last = self._clock()
        self._told_time |= standing.step_left_seconds is not None
        self._write(self._form(standing))


@contextmanager
def keep_telling(lines: ProgressLines) -> Iterator[None]:
    """A thread that lets `lines` tick."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_PULSE_SECONDS):
            lines.tick()

    thread = threading.Thread(target=beat, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def text_line(standing: Standing) -> str:
    """`measuring (step 6 of 8): 4 of 36 blocks, 0:12:30 elapsed, about 1:40:00 left; 6.1 GiB resident`."""
    number = f" (step {standing.number} of {standing.steps})" if standing.steps > 1 else ""
    parts = [amount_done(standing)] if standing.unit else []
    if standing.elapsed_seconds is not None:
        parts.append(f"{duration(standing.elapsed_seconds)} elapsed")
    parts += left(standing)
    if standing.detail:
        parts.append(f"at {standing.detail}")
    memory = "" if standing.resident_bytes is None else f"; {standing.resident_bytes / 2**30:.1f} GiB resident"
    return f"{standing.step}{number}: {', '.join(parts) or 'not begun'}{memory}"


def amount_done(standing: Standing) -> str:
    """`4 of 36 blocks`. Parts of a unit are told by their detail."""
    plural = "" if standing.total == 1 or standing.unit == "MiB" else "s"
    done = "" if not standing.done else f"{_number(standing.done)} of "
    return f"{done}{_number(standing.total)} {standing.unit}{plural}"


def _number(units: float) -> str:
    """Whole ones; a part of less than one as it is."""
    return f"{int(units + 1e-3):,}" if units > 0.99 else f"{units:.2g}"


def left(standing: Standing) -> list[str]:
    """What is known of the time left, and of what comes."""
    of_step, of_all = standing.step_left_seconds, standing.left_seconds
    told = []
    if of_step is not None:
        told.append(f"about {duration(of_step)} left" + (" of this step" if standing.then else ""))
    if not standing.then:
        return told
    if of_all is not None:
        return [*told, f"of all about {duration(of_all)}"]
    first, *more = standing.then
    return [*told, f"then {first}" + (f" and {len(more)} more" if more else "")]


def duration(seconds: float) -> str:
    """`h:mm:ss`."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def standing_of(document: dict[str, Any]) -> Standing:
    """What `json_line` was made from. Raises ValueError for another object."""
    return Standing.model_validate({key: value for key, value in document.items() if key != "time"})


def json_line(standing: Standing) -> str:
    """One JSON object: the fields of `Standing`, and the time (UTC)."""
    document: dict[str, Any] = {"time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
    return json.dumps(document | standing.model_dump(mode="json"))
