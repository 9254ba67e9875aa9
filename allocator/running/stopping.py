"""SIGTERM as a request: the step at hand is finished and kept, then the program ends with exit code 75."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from allocator.contract.errors import StoppedError

__all__ = ["GRACE_SECONDS", "finish_step_on_sigterm", "steps_begin", "stop_requested"]

GRACE_SECONDS = 100.0
"""For the step at hand; the chart's Job is killed after 120."""

_requested = threading.Event()
_in_steps = threading.Event()


def stop_requested() -> bool:
    """Whether SIGTERM has come since `finish_step_on_sigterm` was entered."""
    return _requested.is_set()


def steps_begin() -> None:
    """From here on steps are kept, and one that is at work is worth to be finished."""
    _in_steps.set()


@contextmanager
def finish_step_on_sigterm() -> Iterator[None]:
    """The first SIGTERM is a request that `Journal.save` obeys after its step; a second one stops at once, and so does
    a step that has not ended `GRACE_SECONDS` later. Before `steps_begin` the first one stops at once: nothing is lost.

    Signals reach the main thread only; in any other thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(_number: int, _frame: FrameType | None) -> None:
        if _requested.is_set() or not _in_steps.is_set():
            raise StoppedError("stopped at once; the same command goes on from the last finished step")
        _requested.set()
        patience.start()

    main = threading.main_thread().ident
    assert main is not None
    # To the main thread itself, so that a call it waits in is interrupted.
    patience = threading.Timer(GRACE_SECONDS, signal.pthread_kill, [main, signal.SIGTERM])
    patience.daemon = True
    _requested.clear()
    _in_steps.clear()
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        patience.cancel()
        signal.signal(signal.SIGTERM, before)
        _requested.clear()
        _in_steps.clear()
