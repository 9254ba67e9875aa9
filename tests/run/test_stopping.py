"""SIGTERM ends a run at any time: after the step at hand, or in the middle of one that does not end."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from allocator.contract.errors import StoppedError
from allocator.run import journal
from allocator.run.journal import finish_step_on_sigterm, steps_begin, stop_requested


def stopped_in(begin: Callable[[], None]) -> None:
    """SIGTERM in work that would take a minute."""
    with finish_step_on_sigterm():
        begin()
        signal.raise_signal(signal.SIGTERM)
        threading.Event().wait(60)


def test_a_step_that_does_not_end_is_stopped_after_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "GRACE_SECONDS", 0.05)
    with pytest.raises(StoppedError, match="stopped at once"):
        stopped_in(steps_begin)


def test_before_the_first_step_nothing_is_waited_for() -> None:
    with pytest.raises(StoppedError, match="stopped at once"):
        stopped_in(lambda: None)


def test_what_a_step_keeps_on_its_way_does_not_stop_it(tmp_path: Path) -> None:
    kept = journal.Journal(tmp_path)
    with finish_step_on_sigterm():
        steps_begin()
        signal.raise_signal(signal.SIGTERM)
        kept.save("gradients", True, may_stop=False)
        with pytest.raises(StoppedError, match="after the step measured"):
            kept.save("measured", True)
    assert kept.load("gradients")
    assert kept.load("measured")


def test_a_step_that_ends_is_not_stopped() -> None:
    with finish_step_on_sigterm():
        steps_begin()
        signal.raise_signal(signal.SIGTERM)
    assert not stop_requested()
    for timer in [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]:
        timer.join(30)
        assert not timer.is_alive()
