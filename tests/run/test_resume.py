"""Work that is killed, at any point and by a real SIGKILL, ends in the same bytes when the command is given again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.run.processes import gamma, renames

SMALL = ["--group-size", "32", "--sequences", "4", "--sequence-length", "32"]
ENDED = 0
KILLED = -9


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Content by name of all files that a later step or a server reads."""
    kept = [p for p in folder.rglob("*") if p.is_file() and p.name != "model-digest.json"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


class Learned:
    """An uninterrupted `gamma learn`: the command less its --out, what it left, and where it could be killed."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.command = ["learn", model, *SMALL, "--quantizer", "gptq"]
        self.work = folder / "work"
        log = folder / "log"
        assert gamma(*self.command, "--out", self.work, log=log) == ENDED
        self.left = bytes_of(self.work)
        self.kill_points = renames(log)


@pytest.fixture(scope="module")
def learned(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Learned:
    return Learned(tiny_model("llama"), tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.slow
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_killed_run_that_goes_on_ends_in_the_same_bytes(
    learned: Learned, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    work = tmp_path_factory.mktemp("killed") / "work"
    point = data.draw(st.integers(1, learned.kill_points), label="killed at rename")
    assert gamma(*learned.command, "--out", work, die_at=point) == KILLED
    if data.draw(st.booleans(), label="killed again"):
        gamma(*learned.command, "--out", work, die_at=data.draw(st.integers(1, 30)))
    assert gamma(*learned.command, "--out", work) == ENDED
    assert bytes_of(work) == learned.left


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_gets_there(learned: Learned, tmp_path: Path) -> None:
    for _ in range(60):
        code = gamma(*learned.command, "--out", tmp_path / "work", die_at=20)
        if code == ENDED:
            break
        assert code == KILLED
    assert code == ENDED
    assert bytes_of(tmp_path / "work") == learned.left


@pytest.mark.slow
def test_channel_blocks_are_ordered_and_learned_the_same_after_a_kill(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    command = ["learn", tiny_model("llama"), *SMALL, "--granularity", "channel-block", "--channel-blocks", "4"]
    command += ["--quantizer", "learned-rounding:iterations=2,up_to_bits=3"]
    log = tmp_path / "log"
    assert gamma(*command, "--out", tmp_path / "whole", log=log) == ENDED
    # Among the orders, the candidates, and what is learned of them.
    for point in (9, 14, renames(log) // 2):
        assert gamma(*command, "--out", tmp_path / "work", die_at=point) == KILLED
    assert gamma(*command, "--out", tmp_path / "work") == ENDED
    assert bytes_of(tmp_path / "work") == bytes_of(tmp_path / "whole")


def test_sigterm_finishes_the_step_and_the_same_command_goes_on(learned: Learned, tmp_path: Path) -> None:
    work, log = tmp_path / "work", tmp_path / "log"
    for point in (learned.kill_points // 3, learned.kill_points // 3):
        assert gamma(*learned.command, "--out", work, stop_at=point, log=log) == 75
        assert "stopped on request after the step" in log.read_text()
    assert gamma(*learned.command, "--out", work, "--resume", "must") == ENDED
    assert bytes_of(work) == learned.left


@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
def test_an_export_that_is_killed_goes_on(learned: Learned, tmp_path: Path, share: float) -> None:
    manifest, log = tmp_path / "manifest.json", tmp_path / "log"
    assert gamma("solve", learned.work / "scores.json", "--average-bits", 4, "--out", manifest) == ENDED
    command = ["export", learned.command[1], "--manifest", manifest, "--bank", learned.work / "bank"]
    assert gamma(*command, "--out", tmp_path / "whole", log=log) == ENDED
    point = max(1, round(share * renames(log)))
    assert gamma(*command, "--out", tmp_path / "killed", die_at=point) == KILLED
    if not (tmp_path / "killed").exists():  # else it was killed after the folder got its name
        assert gamma(*command, "--out", tmp_path / "killed") == ENDED
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


def test_resume_says_which_setting_differs(learned: Learned, tmp_path: Path) -> None:
    work, log = tmp_path / "work", tmp_path / "log"
    shutil.copytree(learned.work, work)
    other = [*learned.command[:-1], "rtn", "--draws", "2", "--out", work]
    assert gamma(*other, "--resume", "must", log=log) == 2
    assert "candidates.quantizer was gptq, is rtn" in log.read_text()
    assert "learning.draws was 8, is 2" in log.read_text()
    assert bytes_of(work) == learned.left
    assert gamma(*other, "--json", log=log) == ENDED
    assert "candidates.quantizer was gptq, is rtn" in log.read_text()
    assert json.loads((work / "bank" / "bank.json").read_text())["quantizer"] == "rtn"


def test_resume_must_needs_something_to_resume(learned: Learned, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert gamma(*learned.command, "--out", tmp_path / "work", "--resume", "must", log=log) == 2
    assert "nothing to resume" in log.read_text()


def test_resume_never_begins_anew(learned: Learned, tmp_path: Path) -> None:
    work, log = tmp_path / "work", tmp_path / "log"
    shutil.copytree(learned.work, work)
    assert gamma(*learned.command, "--out", work, "--resume", "never", log=log) == ENDED
    assert "used again" not in log.read_text()
    assert bytes_of(work) == learned.left
