"""Packages that only this benchmark needs, in a folder of their own: the product's environment stays as it is."""

import os
import subprocess
import sys
from pathlib import Path

from allocator.contract.errors import InputError
from benchmarks.real_models.catalogue import CACHE

__all__ = ["pip", "use_packages"]

REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def pip(*arguments: str) -> None:
    """Raises InputError with pip's last line where it fails."""
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        raise InputError(f"`pip {' '.join(arguments)}` failed: {lines[-1]}")


def use_packages() -> Path:
    """Make `requirements.txt` importable, here and in processes that are started from here; installs it once, without
    dependencies (what they need is in .venv)."""
    wanted = "".join(path.read_text() for path in sorted(REQUIREMENTS.parent.glob("requirements*.txt")))
    folder = CACHE / "packages"
    installed = folder / "installed.txt"
    if not installed.exists() or installed.read_text() != wanted:
        pip("install", "--no-deps", "--upgrade", "--target", str(folder), "-r", str(REQUIREMENTS))
        installed.write_text(wanted)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(folder)]))
    return folder
