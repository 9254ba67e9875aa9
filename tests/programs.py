"""Programs that `.ci/tools` brings."""

import os
import shutil
from pathlib import Path

import pytest

__all__ = ["TOOLS", "program"]

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
TOOLS = Path(os.environ.get("GAMMA_TOOLS") or _CACHE / "gamma-tools")


def program(name: str) -> str:
    """Path of a program. Where it is missing the test is skipped; in continuous integration it fails."""
    for place in (TOOLS / name, TOOLS / name / "bin" / name):
        if place.is_file() and os.access(place, os.X_OK):
            return str(place)
    found = shutil.which(name)
    if found is None:
        reason = f"{name} is not here; `bash .ci/tools` brings it where it can"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found
