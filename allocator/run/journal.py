"""Results of finished steps, one small file each, so that work that was killed goes on where it stood.

The rule that makes a resumed run equal to an uninterrupted one, to the bit: whatever a loop carries from one step to
the next is in the state that it saves, random generators included, and nothing else is carried.
"""

import io
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from allocator.contract.errors import StoppedError
from allocator.run.process_group import ALONE, ProcessGroup

__all__ = [
    "GRACE_SECONDS",
    "Journal",
    "finish_step_on_sigterm",
    "steps_begin",
    "stop_requested",
]

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


State = TypeVar("State")


class Journal:
    """Steps by name in a folder. States are nested dicts, lists and tuples of tensors, numbers and text.

    With a process group, the first process writes and all of them read.
    """

    def __init__(self, folder: Path | None, process_group: ProcessGroup = ALONE) -> None:
        self.folder = folder
        self.process_group = process_group

    @classmethod
    def nowhere(cls) -> "Journal":
        """A journal that keeps nothing, for short work."""
        return cls(None)

    def section(self, name: str) -> "Journal":
        """A journal of its own inside this one."""
        return Journal(None if self.folder is None else self.folder / name, self.process_group)

    def load(self, step: str) -> Any | None:
        """The state that was saved for `step`, None if there is none (or a damaged one)."""
        if self.folder is None:
            return None
        try:
            return torch.load(self._path(step), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
            return None

    def save(self, step: str, state: Any, may_stop: bool = True) -> None:
        """Keep `state`; then raise StoppedError if SIGTERM asked for it (in any process of the group), unless another
        step of the same work is about to be kept."""
        if self.folder is not None and self.process_group.leads:
            self.folder.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()
            torch.save(state, content)
            path = self._path(step)
            temporary = path.with_name(f".{path.name}.tmp")
            try:
                with temporary.open("wb") as file:
                    file.write(content.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        if may_stop and self.process_group.any(stop_requested()):
            kept = "nothing is kept of it" if self.folder is None else "the same command goes on from here"
            raise StoppedError(f"stopped on request after the step {step}; {kept}")

    def once(self, step: str, compute: Callable[[], State]) -> State:
        """The saved state of `step`, or that of `compute()`, which is saved."""
        state: State | None = self.load(step)
        if state is None:
            state = compute()
            self.save(step, state)
        return state

    def clear(self) -> None:
        """Forget all steps, those of the sections too."""
        if self.folder is not None and self.process_group.leads:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.process_group.wait()

    def _path(self, step: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{step}.pt"
