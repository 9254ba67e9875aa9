"""What `make test-tools` brings beside .venv: programs, and the packages of object storage and of GGUF files."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.skips import lacking

__all__ = ["GGUF", "OBJECT_STORAGE", "VLLM_ROUTER", "program"]

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
TOOLS = Path(os.environ.get("GAMMA_TOOLS") or _CACHE / "gamma-tools")
OBJECT_STORAGE = TOOLS / f"object-storage-{sys.implementation.cache_tag}"
"""A folder of packages for this Python."""
VLLM_ROUTER = TOOLS / f"vllm-router-{sys.implementation.cache_tag}"
"""Likewise."""
GGUF = TOOLS / f"gguf-{sys.implementation.cache_tag}"
"""Likewise, to read and write GGUF files."""


def program(name: str) -> str:
    """Path of a program; the test is skipped where it is missing."""
    for place in (TOOLS / name, TOOLS / name / "bin" / name):
        if place.is_file() and os.access(place, os.X_OK):
            return str(place)
    found = shutil.which(name)
    if found is None:
        pytest.skip(lacking("program", f"{name} is not here"))
    return found
