"""Results of finished steps, one small file each, so that work that was killed goes on where it stood.

The rule that makes a resumed run equal to an uninterrupted one, to the bit: whatever a loop carries from one step to
the next is in the state that it saves, random generators included, and nothing else is carried.
"""

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from allocator.contract.errors import StoppedError
from allocator.running.stopping import stop_requested
from allocator.running.team import ALONE, Team

__all__ = ["Journal"]

State = TypeVar("State")


class Journal:
    """Steps by name in a folder. States are nested dicts, lists and tuples of tensors, numbers and text.

    With a team, the first process writes and all of them read.
    """

    def __init__(self, folder: Path | None, team: Team = ALONE) -> None:
        self.folder = folder
        self.team = team

    @classmethod
    def nowhere(cls) -> "Journal":
        """A journal that keeps nothing, for short work."""
        return cls(None)

    def section(self, name: str) -> "Journal":
        """A journal of its own inside this one."""
        return Journal(None if self.folder is None else self.folder / name, self.team)

    def load(self, step: str) -> Any | None:
        """The state that was saved for `step`, None if there is none (or a damaged one)."""
        if self.folder is None:
            return None
        try:
            return torch.load(self._path(step), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
            return None

    def save(self, step: str, state: Any) -> None:
        """Keep `state`; then raise StoppedError if SIGTERM asked for it (in any process of the team)."""
        if self.folder is not None and self.team.leads:
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
        if self.team.any(stop_requested()):
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
        if self.folder is not None and self.team.leads:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.team.wait()

    def _path(self, step: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{step}.pt"
