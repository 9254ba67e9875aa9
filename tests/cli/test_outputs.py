"""Every verb that writes refuses an output that it cannot write before it reads anything else."""

import subprocess
import sys
from pathlib import Path

import pytest

from allocator.cli.main import main

VERBS = {
    "learn": ["learn", "no-model", "--out", "{folder}"],
    "solve": ["solve", "no-scores", "--average-bits", "4", "--out", "{file}"],
    "plan": ["plan", "no-model", "--gpu", "l4", "--out", "{file}"],
    "refine": ["refine", "no-manifest", "--scores", "none", "--out", "{file}"],
    "tune": ["tune", "none", "--model", "m", "--bank", "b", "--text", "t", "--out", "{folder}"],
    "export": ["export", "no-model", "--manifest", "none", "--bank", "none", "--out", "{folder}"],
    "fit": ["fit", "no-model", "--average-bits", "4", "--out", "{folder}"],
    "fit, work": ["fit", "no-model", "--average-bits", "4", "--out", "new", "--work", "{folder}"],
    "kv": ["kv", "no-model", "--out", "{file}"],
    "show": ["show", "no-manifest", "--figure", "{file}.svg"],
    "diff": ["diff", "none", "none", "--figure", "{file}.png"],
    "sweep": ["sweep", "no-scores", "--from", "3bits", "--to", "4bits", "--figure", "{file}.svg"],
    "probe": ["probe", "no-model", "--record", "{file}"],
    "prepare": ["prepare", "no-model", "--store", "none", "--out", "{folder}"],
    "store add": ["store", "add", "no-work", "--model", "none", "--store", "{folder}"],
    "store add-manifest": ["store", "add-manifest", "none", "--store", "{folder}"],
    "sidecar": ["sidecar", "--store", "none", "--checkpoints", "{folder}"],
    "remote": ["remote", "allocate", "none", "--url", "http://127.0.0.1:9", "--budget", "1GB", "--out", "{file}"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_an_output_inside_a_file_is_refused_first(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("mine")
    words = [word.format(file="taken/x", folder="taken/x") for word in VERBS[verb]]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "taken is a file, no folder" in told
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_probe_finds_out_that_the_users_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/cache")
    assert main(["probe", "no-model"]) == 2
    assert "nothing can be written in /proc" in capsys.readouterr().err


def test_a_folder_without_the_right_to_write_is_refused_also_for_root_in_a_container(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o555)
    lost = "-dac_override,-dac_read_search,-fowner"
    as_container = ["setpriv", f"--bounding-set={lost}", f"--inh-caps={lost}"]
    if subprocess.run([*as_container, "true"], capture_output=True, check=False).returncode:
        as_container = []  # not root: the rights of the folder count as they are
    command = [*as_container, sys.executable, "-m", "allocator.cli.main", "solve", "none", "--average-bits", "4"]
    done = subprocess.run([*command, "--out", str(theirs / "m.json")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "theirs (Permission denied)" in done.stderr
