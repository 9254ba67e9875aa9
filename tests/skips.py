"""What a test may need and a machine may lack: every skip names one of these, and continuous integration accepts few.

A test skips with `pytest.skip(lacking("program", "promtool is not here"))`, `pytest.importorskip` counts as a package.
The hooks below, which tests/conftest.py takes over, make a skip that continuous integration does not accept, or that
names nothing of this list, a failure where CI=true, and end every run with a table of what was not tested.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pytest

__all__ = [
    "NEEDS",
    "Need",
    "lacking",
    "lacking_kernel",
    "pytest_make_collect_report",
    "pytest_runtest_makereport",
    "pytest_sessionfinish",
    "pytest_terminal_summary",
    "pytest_testnodedown",
]


@dataclass(frozen=True)
class Need:
    """`remedy` says what would bring it; `in_ci`, whether continuous integration may do without."""

    remedy: str
    in_ci: bool = False


_SHARED_MODELS = Path(__file__).resolve().parents[2] / "shared"

NEEDS = {
    "gpu": Need("make test-gpu, where there is an NVIDIA GPU", in_ci=True),
    "device": Need("make test, where there is an NVIDIA GPU: its packages are those of CUDA builds", in_ci=True),
    "instruction": Need("make test, on a CPU that has it", in_ci=True),
    "vllm": Need("make test: the vLLM in .venv can do it; this is another (make test-versions)", in_ci=True),
    "program": Need("make test-tools, as root on Debian or Ubuntu; else install it"),
    "package": Need("make setup test-tools"),
    "model": Need("none: trained models of others, not in this repository", in_ci=not _SHARED_MODELS.exists()),
    "system": Need("none: the machine does not allow it"),
}


def lacking(need: str, what: str) -> str:
    """The reason of a skip. Raises KeyError if `need` is not in NEEDS."""
    assert NEEDS[need]
    return f"{need}: {what}"


def lacking_kernel(why_not: str | None) -> str:
    """The reason why a kernel cannot run, in its own words, as that of a skip."""
    return lacking("instruction" if "this CPU has" in (why_not or "") else "program", str(why_not))


@dataclass(frozen=True, order=True)
class _Skip:
    """Why tests of a file were left out; `need` is a key of NEEDS, or "" for a reason that names none."""

    need: str
    what: str
    file: str

    @classmethod
    def of(cls, report: pytest.CollectReport | pytest.TestReport) -> "_Skip":
        assert isinstance(report.longrepr, tuple)
        reason, file = report.longrepr[2].removeprefix("Skipped: "), report.nodeid.partition("::")[0]
        need, colon, what = reason.partition(": ")
        if colon and need in NEEDS:
            return cls(need, what, file)
        return cls("package" if reason.startswith("could not import ") else "", reason, file)

    def refusal(self) -> str | None:
        """Why it may not be, here."""
        if os.environ.get("CI") != "true" or (self.need and NEEDS[self.need].in_ci):
            return None
        if not self.need:
            return f"skipped for a reason that is not of tests/skips.py: {self.what}"
        return f"may not be skipped in continuous integration: {self.what}. To have it: {NEEDS[self.need].remedy}"


_WHOLE_FILES = pytest.StashKey[set[_Skip]]()
"""Files that were left out before their tests were counted. xdist does not report them: workers send them at last."""


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report: pytest.CollectReport = yield
    if report.skipped:
        skip = _Skip.of(report)
        collector.config.stash.setdefault(_WHOLE_FILES, set()).add(skip)
        if refusal := skip.refusal():
            report.outcome, report.longrepr = "failed", refusal
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report: pytest.TestReport = yield
    if report.skipped and not hasattr(report, "wasxfail") and (refusal := _Skip.of(report).refusal()):
        report.outcome, report.longrepr = "failed", refusal
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["whole_files"] = [astuple(s) for s in session.config.stash.get(_WHOLE_FILES, ())]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    sent = getattr(node, "workeroutput", {}).get("whole_files", ())
    node.config.stash.setdefault(_WHOLE_FILES, set()).update(_Skip(*skip) for skip in sent)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """For each reason: of which files how many tests, and what would bring them."""
    skipped = terminalreporter.stats.get("skipped", [])
    counts = Counter(_Skip.of(report) for report in skipped if isinstance(report, pytest.TestReport))
    whole = terminalreporter.config.stash.get(_WHOLE_FILES, set())
    if not counts and not whole:
        return
    terminalreporter.write_sep("=", f"not tested here: {counts.total()} tests, {len(whole)} whole files")
    rows: dict[tuple[str, str], list[str]] = {}
    for skip in sorted(counts.keys() | whole):
        rows.setdefault((skip.need, skip.what), []).append(f"{skip.file} ({counts[skip] or 'whole'})")
    for (need, what), files in rows.items():
        terminalreporter.write_line(what)
        terminalreporter.write_line(f"    tests       {', '.join(files)}")
        terminalreporter.write_line(f"    to have it  {NEEDS[need].remedy if need else 'unknown; see tests/skips.py'}")
