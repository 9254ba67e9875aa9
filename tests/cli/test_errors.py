"""Whatever goes wrong, a user is shown one line; the traceback of a fault of ours is kept for its report."""

from pathlib import Path

import pytest

from allocator.cli.main import main


def failing(error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> int:
    def run(_args: object) -> None:
        raise error

    monkeypatch.setattr("allocator.cli.show.run", run)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return main(["show", "manifest.json"])


def test_what_the_system_refuses_is_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert failing(PermissionError(13, "Permission denied", "/out/scores.json"), monkeypatch, tmp_path) == 2
    assert capsys.readouterr().err == "gamma show: /out/scores.json: Permission denied\n"
    assert not list(tmp_path.iterdir())


def test_a_fault_of_ours_is_one_line_and_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert failing(RuntimeError("two\nlines"), monkeypatch, tmp_path) == 1
    said = capsys.readouterr().err
    (report,) = tmp_path.iterdir()
    assert (
        said == f"gamma show: unexpected RuntimeError: two lines (a fault of gamma: please report it with {report})\n"
    )
    assert "Traceback" in report.read_text()
