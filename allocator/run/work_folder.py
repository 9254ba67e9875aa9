"""The folder of one model's work: bank, scores, journal, hidden states, and the fingerprint of the run."""

import logging
import platform
import shutil
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from allocator.contract.bank import BANK_NAME, Bank, ModelReference
from allocator.contract.documents import Document
from allocator.contract.errors import ContractError, InputError
from allocator.contract.scores import Scores
from allocator.run.journal import Journal, steps_begin
from allocator.run.process_group import ALONE, ProcessGroup

__all__ = [
    "RUN_NAME",
    "Resume",
    "RunFingerprint",
    "WorkFolder",
    "versions",
]

RUN_NAME = "run.json"
_PACKAGES = ("gamma-vllm", "torch", "transformers")


class RunFingerprint(Document):
    """`run.json`. The sections in the order of the data flow: what differs in one undoes all that comes after it.

    Nothing else decides what a run can use again. calibration.source is for the record; the digest tells texts apart.
    environment: versions, device, threads. It changes results in the last digits only: work that is kept across such
    a change is whole, but not equal to the bit to a run in one environment.
    """

    SCHEMA: ClassVar[str] = "gamma.run"

    model: ModelReference
    calibration: dict[str, Any]
    candidates: dict[str, Any]
    learning: dict[str, Any]
    environment: dict[str, Any]

    @property
    def tunes(self) -> bool:
        """Whether it is a run of `gamma tune`, whose candidates are those of a manifest."""
        return "manifest" in self.candidates

    def differences(self, now: "RunFingerprint") -> dict[str, str]:
        """Field -> "was ..., is ..." for each field in which `now` is another."""
        before, after = _flat(self.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
        return {
            field: f"was {before.get(field, 'absent')}, is {after.get(field, 'absent')}"
            for field in sorted(before.keys() | after.keys())
            if before.get(field, "absent") != after.get(field, "absent")
        }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


Resume = Literal["auto", "must", "never"]

_LOG = logging.getLogger(__name__)
_SECTIONS = ("states", "channels", "bank", "rounding", "learning")
"""Of the journal, each with what its steps end in: "bank" in bank.json, "learning" in scores.json."""
_UNDONE_BY = {
    "model": _SECTIONS,
    "calibration": _SECTIONS,
    "calibration.source": (),
    "candidates": ("channels", "bank", "rounding", "learning"),
    "learning": ("learning",),
    "environment": (),
}

AnyDocument = TypeVar("AnyDocument", bound=Document)


class WorkFolder:
    """The files of WORK by what they are. Only the first process of a group writes what is not the journal's."""

    def __init__(self, folder: Path, process_group: ProcessGroup = ALONE) -> None:
        self.folder = folder
        self.process_group = process_group
        self.bank = folder / "bank"
        self.scores = folder / "scores.json"
        self.hidden = folder / "hidden"
        self.journal = Journal(folder / "journal", process_group)

    def begin(self, now: RunFingerprint, resume: Resume) -> None:
        """Make the folder fit for a run of fingerprint `now`: what depends on what differs is forgotten, and all if
        there is no valid fingerprint.

        auto: goes on from what fits, and logs which fields differ; raises InputError if the work is another model's, or
        of another kind. must: raises it also if a field differs or there is nothing to go on from. never: deletes what
        an earlier run left here.
        """
        path = self.folder / RUN_NAME
        before = self.process_group.from_leader(lambda: _read(RunFingerprint, path))
        if resume != "never":
            self._refuse_others(before, now)
        if resume == "must":
            self._insist(before, now)
        if resume == "never":
            self._delete_all()
        elif before is None:
            self._undo(_SECTIONS)
        elif differences := before.differences(now):
            told = _told(differences)
            _LOG.warning("%s was begun otherwise: %s. What depends on it is made again", self.folder, told)
            self._undo({section for field in differences for section in _undone_by(field)})
        if self.process_group.leads:
            for temporary in (*self.folder.glob(".*.json.*"), *self.bank.glob(".*")):
                temporary.unlink()  # half written when an earlier run was killed
            if self.finished_bank() is None:
                self.scores.unlink(missing_ok=True)  # a bank that is lost is made again, and with it what was learned
            now.write(path)
        self.process_group.wait()
        steps_begin()

    def finished_bank(self) -> Bank | None:
        """The bank that the run of the fingerprint has built; None if it has not, or if bank.json is damaged."""
        return _read(Bank, self.bank / BANK_NAME)

    def finished_scores(self) -> Scores | None:
        """What the run of the fingerprint has learned; None if it has not, or if scores.json is damaged."""
        return _read(Scores, self.scores)

    def finish(self) -> None:
        """Delete what only a run that goes on would need."""
        self.journal.clear()
        if self.process_group.leads:
            shutil.rmtree(self.hidden, ignore_errors=True)
        self.process_group.wait()

    def _undo(self, sections: Collection[str]) -> None:
        """Forget these sections of the journal, and take their results away: what is not finished must not look so."""
        if self.process_group.leads:
            if "learning" in sections:
                self.scores.unlink(missing_ok=True)
            if "bank" in sections:
                (self.bank / BANK_NAME).unlink(missing_ok=True)
        for section in sorted(sections):
            self.journal.section(section).clear()

    def _refuse_others(self, before: RunFingerprint | None, now: RunFingerprint) -> None:
        """Hours of work that is no earlier attempt at this run are not deleted because a folder was mistyped."""
        found = self.process_group.from_leader(lambda: self._model_here(before))
        advice = "give another folder, or --resume never to delete it and begin anew"
        if found is not None and found.digest != now.model.digest:
            raise InputError(
                f"{self.folder}: holds the work of {found.name} ({found.digest}), and this is {now.model.name} "
                f"({now.model.digest}); {advice}"
            )
        if before is not None and before.tunes != now.tunes:
            kinds = ("what was tuned", "what was learned")
            kept, asked = kinds if before.tunes else kinds[::-1]
            raise InputError(f"{self.folder}: holds {kept}, and this would be {asked}; {advice}")

    def _model_here(self, before: RunFingerprint | None) -> ModelReference | None:
        """Whose work is here: results say so too, if run.json was lost."""
        document = before or self.finished_scores() or self.finished_bank()
        return None if document is None else document.model

    def _insist(self, before: RunFingerprint | None, now: RunFingerprint) -> None:
        if before is None:
            raise InputError(f"{self.folder}: nothing to resume (no valid {RUN_NAME}); leave out --resume must")
        if differences := before.differences(now):
            raise InputError(
                f"{self.folder}: cannot be resumed as it was begun: {_told(differences)}; "
                "give the same settings, or --resume auto to make again what depends on them"
            )

    def _delete_all(self) -> None:
        self.finish()
        if self.process_group.leads:
            for name in (RUN_NAME, self.scores.name):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.bank, ignore_errors=True)
        self.process_group.wait()


def _undone_by(field: str) -> Sequence[str]:
    return _UNDONE_BY[field if field in _UNDONE_BY else field.partition(".")[0]]


def _told(differences: Mapping[str, str]) -> str:
    return "; ".join(f"{field} {change}" for field, change in differences.items())


def _read(kind: type[AnyDocument], path: Path) -> AnyDocument | None:
    """The document at `path`, or None if it is absent or damaged."""
    try:
        return kind.read(path)
    except ContractError:
        return None
