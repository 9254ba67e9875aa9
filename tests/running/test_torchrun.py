"""Two processes share the calibration sequences and give what one gives; what they leave behind, one goes on with."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.running.processes import gamma

# Two batches of states, four of learning: each process has some of each.
SMALL = ["--group-size", "32", "--sequences", "64", "--sequence-length", "128"]
CUT = ["--granularity", "channel-block", "--channel-blocks", "4"]


def torchrun(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*command, "-m", "allocator.cli.main", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def bytes_of(work: Path) -> dict[str, bytes]:
    files = [*work.glob("*.json"), *work.glob("bank/*")]
    return {str(p.relative_to(work)): p.read_bytes() for p in files if p.name != "model-digest.json"}


def assert_same(found: Path, expected: Path) -> None:
    """The same files; scores up to 1e-5, as products need not be the same to the last bit in every process."""
    files, wanted = bytes_of(found), bytes_of(expected)
    scores, wanted_scores = (json.loads(f.pop("scores.json"))["modules"] for f in (files, wanted))
    assert files == wanted
    assert scores.keys() == wanted_scores.keys()
    for name, module in scores.items():
        for candidate, other in zip(module["candidates"], wanted_scores[name]["candidates"], strict=True):
            assert candidate["score"] == pytest.approx(other["score"], rel=1e-5, abs=1e-12), name


@pytest.mark.slow
@pytest.mark.parametrize("options", [["gptq"], ["rtn", *CUT]], ids=["gptq", "rtn, channel blocks"])
def test_two_processes_give_the_scores_of_one(
    options: list[str], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    command = ["learn", tiny_model("llama"), *SMALL, "--quantizer", *options]
    assert gamma(*command, "--out", tmp_path / "one") == 0
    done = torchrun(2, *command, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("scores in ") == 1  # one of them speaks
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_began(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    command = ["learn", tiny_model("llama"), *SMALL, "--quantizer", "gptq"]
    assert gamma(*command, "--out", tmp_path / "one") == 0
    assert gamma(*command, "--out", tmp_path / "begun", die_at=50) == -9
    done = torchrun(2, *command, "--out", tmp_path / "begun")
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "begun", tmp_path / "one")
