"""The folder of one model's work: bank, scores, and while the work goes on its journal and hidden states."""

import logging
import shutil
from pathlib import Path
from typing import Literal

from allocator.contract.errors import ContractError, InputError
from allocator.running.fingerprint import RUN_NAME, RunFingerprint
from allocator.running.journal import Journal
from allocator.running.stopping import steps_begin
from allocator.running.team import ALONE, Team

__all__ = ["Resume", "WorkFolder"]

Resume = Literal["auto", "must", "never"]

_LOG = logging.getLogger(__name__)
_UNDONE_BY = {
    "model": ("calibration", "states", "bank", "learning"),
    "calibration": ("states", "bank", "learning"),
    "candidates": ("bank", "learning"),
    "learning": ("learning",),
    "environment": (),
}


class WorkFolder:
    """The files of WORK by what they are. Only a team's first process writes what is not the journal's."""

    def __init__(self, folder: Path, team: Team = ALONE) -> None:
        self.folder = folder
        self.team = team
        self.bank = folder / "bank"
        self.scores = folder / "scores.json"
        self.hidden = folder / "hidden"
        self.journal = Journal(folder / "journal", team)

    def begin(self, now: RunFingerprint, resume: Resume) -> None:
        """Make the folder fit for a run of fingerprint `now`: steps that depend on what differs are forgotten.

        auto: goes on from what fits, and logs which fields differ. must: raises InputError if a field differs or there
        is nothing to go on from. never: deletes what an earlier run left here.
        """
        path = self.folder / RUN_NAME
        before = None if resume == "never" else self._before(path)
        if resume == "must":
            self._insist(before, now)
        if resume == "never":
            self._delete_all()
        differences = before.differences(now) if before is not None else {}
        if differences:
            shown = "; ".join(f"{field} {change}" for field, change in differences.items())
            _LOG.warning("%s was begun otherwise: %s. What depends on it is made again", self.folder, shown)
        changed = {field.partition(".")[0] for field in differences}
        for section in sorted({name for part in changed for name in _UNDONE_BY.get(part, ())}):
            self.journal.section(section).clear()
        if self.team.leads:
            for temporary in (*self.folder.glob(".*.json.*"), *self.bank.glob(".*")):
                temporary.unlink()  # half written when an earlier run was killed
            now.write(path)
        self.team.wait()
        steps_begin()

    def finish(self) -> None:
        """Delete what only a run that goes on would need."""
        self.journal.clear()
        if self.team.leads:
            shutil.rmtree(self.hidden, ignore_errors=True)
        self.team.wait()

    def _before(self, path: Path) -> RunFingerprint | None:
        try:
            return RunFingerprint.read(path)
        except ContractError:
            return None

    def _insist(self, before: RunFingerprint | None, now: RunFingerprint) -> None:
        if before is None:
            raise InputError(f"{self.folder}: nothing to resume (no valid {RUN_NAME}); leave out --resume must")
        if differences := before.differences(now):
            shown = "; ".join(f"{field} {change}" for field, change in differences.items())
            raise InputError(
                f"{self.folder}: cannot be resumed as it was begun: {shown}; "
                "give the same settings, or --resume auto to make again what depends on them"
            )

    def _delete_all(self) -> None:
        self.finish()
        if self.team.leads:
            for name in (RUN_NAME, self.scores.name):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.bank, ignore_errors=True)
        self.team.wait()
