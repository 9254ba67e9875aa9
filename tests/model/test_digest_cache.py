"""The remembered model digest is that of the model, or is not used."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from allocator.model import cached_model_digest, model_digest, read_inventory


@pytest.fixture
def model(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    return folder


def read_bytes(model: Path, cache: Path) -> tuple[str, int]:
    """The digest, and how many bytes of weights were read for it."""
    read: list[int] = [0]
    digest = cached_model_digest(read_inventory(model), cache, lambda done, _total: read.append(done))
    return digest, read[-1]


@pytest.fixture(autouse=True)
def _old_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the files had been written long ago: their time of change cannot be set."""
    monkeypatch.setattr("allocator.model.identity._SETTLED_NANOSECONDS", -(10**18))


def test_the_weights_are_read_once(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache.json"
    digest, read = read_bytes(model, cache)
    assert digest == model_digest(read_inventory(model))
    assert read > 0
    assert read_bytes(model, cache) == (digest, 0)


def test_a_changed_weight_of_equal_size_and_time_is_noticed(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache.json"
    before, _ = read_bytes(model, cache)
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, (1, 1))  # the time of modification is set back; that of the change cannot be
    after, read = read_bytes(model, cache)
    assert read > 0
    assert after == model_digest(read_inventory(model)) != before


def test_a_changed_config_is_noticed(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache.json"
    before, _ = read_bytes(model, cache)
    config = model / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert read_bytes(model, cache)[0] == model_digest(read_inventory(model)) != before


def test_files_that_were_just_written_are_not_remembered(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("allocator.model.identity._SETTLED_NANOSECONDS", 10**18)
    read_bytes(model, tmp_path / "cache.json")
    assert not (tmp_path / "cache.json").exists()


def test_a_damaged_cache_is_not_used(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache.json"
    digest, _ = read_bytes(model, cache)
    cache.write_text(cache.read_text().replace(digest[-8:], "00000000"))
    assert read_bytes(model, cache)[0] == digest
