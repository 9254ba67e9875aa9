"""Two processes share the calibration sequences and give what one gives; what they leave behind, one goes on with."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.run.processes import gamma

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
    """The same files; scores up to 1e-5 and correlations up to a last bit, since once a process had gradients that
    differed in their last bits. All else in the scores is equal."""
    files, wanted = bytes_of(found), bytes_of(expected)
    documents = [json.loads(f.pop("scores.json")) for f in (files, wanted)]
    assert files == wanted
    numbers = []
    for document in documents:
        del document["digest"]
        candidates = [c for module in document["modules"].values() for c in module["candidates"]]
        scores = np.array([candidate.pop("score") for candidate in candidates])
        interactions = document.pop("interactions")
        correlations = np.frombuffer(base64.b64decode(interactions["correlations"]), np.float16).astype(float)
        numbers.append((scores, correlations, interactions["least_eigenvalue"]))
    assert documents[0] == documents[1]
    for (values, others), (relative, absolute) in zip(
        zip(*numbers, strict=True), [(1e-5, 1e-12), (0, 1e-3), (1e-3, 0)], strict=True
    ):
        np.testing.assert_allclose(values, others, rtol=relative, atol=absolute)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["kfac"], ["rtn", *CUT]], ids=["kfac", "rtn, channel blocks"])
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
    assert bytes_of(tmp_path / "begun") == bytes_of(tmp_path / "one")
