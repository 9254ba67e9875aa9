"""A disk that is too small is refused by the right amount; one that fills up costs no finished work."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from allocator.contract.errors import InputError
from allocator.pipeline.pipeline import CandidateSettings, SolveSettings, export, learn, solve_scores
from allocator.run.progress import Standing, Tracker
from allocator.score import LearningSettings
from tests.skips import lacking

CANDIDATES = CandidateSettings(quantizer="rtn", group_size=32, sequences=4, sequence_length=64)
LEARNING = LearningSettings(batch_tokens=128, draws=2)
QUICK = LearningSettings(batch_tokens=128, draws=1)

Learnable = tuple[Path, CandidateSettings]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Learnable:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 200)
    return tiny_model("llama"), CandidateSettings(**(vars(CANDIDATES) | {"calibration": [text]}))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip(lacking("system", "no disk can be mounted here"))
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def _used(folder: Path) -> int:
    return sum(p.lstat().st_blocks * 512 for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def _needed(told: pytest.ExceptionInfo[InputError]) -> int:
    found = re.search(r"need ([\d,]+) more", str(told.value))
    assert found is not None
    return int(found[1].replace(",", ""))


def test_what_is_said_to_be_needed_is_what_is_used(
    model: Learnable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, candidates = model
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _path: full)
        with pytest.raises(InputError) as told:
            learn(folder, tmp_path / "work", candidates, LEARNING)
    needed, most = _needed(told), 0

    def look(_standing: Standing) -> None:
        nonlocal most
        most = max(most, _used(tmp_path / "work"))

    learn(folder, tmp_path / "work", candidates, LEARNING, Tracker(look))
    assert most <= needed < 1.2 * most

    # The source's weights are links in the bank: they take no room, and give none.
    (tmp_path / "work" / "scores.json").unlink()
    there = _used(tmp_path / "work" / "bank")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _path: full)
        with pytest.raises(InputError) as told:
            learn(folder, tmp_path / "work", candidates, LEARNING)
    assert _needed(told) == needed - there


def test_learning_goes_on_when_a_full_disk_has_room_again(model: Learnable, disk: Path, tmp_path: Path) -> None:
    folder, candidates = model

    def fill(standing: Standing) -> None:
        if standing.step == "candidates" and standing.share > 0.3 and not (disk / "ballast").exists():
            (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free))

    with pytest.raises(InputError, match=r"work: its disk is full; make room .*What was finished is kept"):
        learn(folder, disk / "work", candidates, QUICK, Tracker(fill))
    assert [path for path in disk.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"] == []
    kept = sorted((disk / "work" / "bank").glob("model.layers.*"))
    assert kept
    (disk / "ballast").unlink()
    result = learn(folder, disk / "work", candidates, QUICK)
    assert result.scores.digest == learn(folder, tmp_path / "work", candidates, QUICK).scores.digest


def test_an_export_goes_on_when_a_full_disk_has_room_again(model: Learnable, disk: Path, tmp_path: Path) -> None:
    folder, candidates = model
    learned = learn(folder, tmp_path / "work", candidates, QUICK)
    manifest = solve_scores(learned.scores, SolveSettings(average_bits=6))

    def fill(standing: Standing) -> None:
        if standing.step == "writing" and not (disk / "ballast").exists():
            (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free))

    with pytest.raises(InputError, match=r"\.out\.partial: its disk is full; make room .*goes on from what is written"):
        export(manifest, folder, learned.bank_folder, disk / "out", progress=Tracker(fill))
    assert not (disk / "out").exists()
    with pytest.raises(InputError, match=r"has 0 bytes free, the checkpoint needs \d+; make room"):
        export(manifest, folder, learned.bank_folder, disk / "out")
    (disk / "ballast").unlink()
    (tmp_path / "link").symlink_to(disk / "out")
    report = export(manifest, folder, learned.bank_folder, tmp_path / "link")
    assert report.predicted == report.written
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in disk.iterdir()) == ["out"]
