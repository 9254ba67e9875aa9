"""A store with a tiny model that was really learned, and one with scores of Qwen3-32B's shapes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .scores import publish_scores
from .serving import Running, running

LEARN = ["--group-size", "32", "--quantizer", "rtn", "--sequences", "4", "--sequence-length", "32"]


def gamma(*arguments: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "allocator.cli.main", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="session")
def learned(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Model folder and work folder of `gamma learn`."""
    model, work = tiny_model("qwen3"), tmp_path_factory.mktemp("learned") / "work"
    gamma("learn", model, "--out", work, *LEARN)
    return model, work


@pytest.fixture(scope="session")
def tiny_store(learned: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder store that offers the tiny model as "tiny". Only added to by the tests."""
    model, work = learned
    folder = tmp_path_factory.mktemp("store") / "store"
    gamma("store", "add", work, "--model", model, "--store", folder, "--name", "tiny")
    return folder


@pytest.fixture(scope="session")
def store(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder store that offers both; only added to."""
    folder = tmp_path_factory.mktemp("both") / "store"
    shutil.copytree(tiny_store, folder)
    publish_scores(folder)
    return folder


@pytest.fixture(scope="session")
def sidecar(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One service for all tests that do not harm it."""
    with running(tmp_path_factory.mktemp("sidecar") / "log", "--store", store) as service:
        yield service
