"""Packages that only this benchmark needs, in a folder of their own: the product's environment stays as it is."""

import os
import subprocess
import sys
from pathlib import Path

from allocator.contract.errors import InputError
from benchmarks.real_models.catalogue import CACHE

__all__ = ["installed", "pip", "use_packages"]

HERE = Path(__file__).parent


def pip(*arguments: str) -> None:
    """Raises InputError with pip's last line where it fails."""
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        raise InputError(f"`pip {' '.join(arguments)}` failed: {lines[-1]}")


def installed(requirements: str, name: str) -> Path:
    """The folder of packages of `name` in the cache, filled once from a requirements file of this benchmark, without
    dependencies (what the packages need beside each other is in .venv)."""
    file = HERE / requirements
    wanted = "".join(path.read_text() for path in [file, *(HERE / line[3:] for line in _included(file))])
    folder = (
        CACHE / name / "site-packages"
    )  # so named, dill takes what is there for packages, and not for a user's code
    stamp = folder / "installed.txt"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"packages of {requirements}", flush=True)
        pip("install", "--no-deps", "--upgrade", "--target", str(folder), "-r", str(file))
        stamp.write_text(wanted)
    return folder


def _included(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line.startswith("-r ")]


def use_packages(requirements: str = "requirements.txt", name: str = "packages") -> None:
    """Make packages (see `installed`) importable, here and in processes that are started from here."""
    folder = str(installed(requirements, name))
    if folder not in sys.path:
        sys.path.append(folder)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), folder]))
