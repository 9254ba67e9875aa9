"""The GPU that this process can see, read in a short-lived process so that no driver is ever loaded into ours.

`python -m allocator.plan.visible_gpus` is that process: NVML if nvidia-ml-py is installed, else nvidia-smi.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence

from pydantic import Field, ValidationError

from allocator.contract.documents import Strict
from allocator.contract.errors import InputError
from allocator.plan.gpus import Device, cuda_memory, find_gpu

__all__ = ["VisibleGpu", "device_of_visible", "read_devices"]

_SECONDS = 20.0
_SAME_MEMORY = 0.02


class VisibleGpu(Strict):
    """One visible GPU. `memory_bytes` is what the driver reports as total (of the MIG slice, if it is one)."""

    name: str
    memory_bytes: int = Field(ge=1)
    compute_capability: str | None = None


def read_devices(timeout_seconds: float = _SECONDS) -> list[VisibleGpu]:
    """The visible GPUs in the order of their index, empty when there is none or reading fails. Never raises."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "allocator.plan.visible_gpus"],
            capture_output=True, text=True, timeout=timeout_seconds, check=False,
        )  # fmt: skip
        return [VisibleGpu.model_validate(item) for item in json.loads(done.stdout)]
    except (OSError, subprocess.SubprocessError, ValueError, ValidationError):
        return []


def device_of_visible(devices: Sequence[VisibleGpu], ranks: int) -> Device:
    """The smallest of the visible GPUs as the planner wants it. Raises InputError when there are too few.

    A card of the catalogue is taken from there, with the memory that CUDA is known to see; another one, and a part of a
    card, is taken by its memory.
    """
    if len(devices) < ranks:
        raise InputError(f"{len(devices)} GPUs are visible, --tensor-parallel-size is {ranks}")
    smallest = min(devices[:ranks] if ranks > 1 else devices[:1], key=lambda d: d.memory_bytes)
    try:
        known = find_gpu(smallest.name)
    except InputError:
        known = None
    if known is not None and abs(known.total_bytes - smallest.memory_bytes) <= _SAME_MEMORY * known.total_bytes:
        return known
    capability = None
    if smallest.compute_capability:
        major, _, minor = smallest.compute_capability.partition(".")
        capability = int(major), int(minor or 0)
    return Device(
        name=smallest.name,
        total_bytes=smallest.memory_bytes,
        cuda_bytes=cuda_memory(smallest.memory_bytes >> 20),
        basis="formula",
        capability=capability,
    )


def _by_nvml() -> list[dict[str, object]]:
    import pynvml

    pynvml.nvmlInit()
    found = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        name = pynvml.nvmlDeviceGetName(handle)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        for part in _mig_slices(pynvml, handle) or [handle]:
            memory = pynvml.nvmlDeviceGetMemoryInfo(part).total
            found.append({
                "name": name if isinstance(name, str) else name.decode(),
                "memory_bytes": int(memory),
                "compute_capability": f"{major}.{minor}",
            })  # fmt: skip
    return found


def _mig_slices(pynvml: object, handle: object) -> list[object]:
    """Handles of the MIG slices of a GPU; empty when it is not partitioned."""
    try:
        if pynvml.nvmlDeviceGetMigMode(handle)[0] != 1:  # type: ignore[attr-defined]
            return []
        count = pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)  # type: ignore[attr-defined]
    except Exception:
        return []
    slices = []
    for index in range(count):
        try:
            slices.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))  # type: ignore[attr-defined]
        except Exception:
            continue
    return slices


def _by_nvidia_smi() -> list[dict[str, object]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = "--query-gpu=name,memory.total,compute_cap"
    done = subprocess.run(
        [program, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=_SECONDS, check=True
    )
    found: list[dict[str, object]] = []
    for line in done.stdout.splitlines():
        name, memory, capability = (part.strip() for part in line.rsplit(",", 2))
        found.append({"name": name, "memory_bytes": int(memory) << 20, "compute_capability": capability})
    return found


def main() -> None:
    for read in (_by_nvml, _by_nvidia_smi):
        try:
            found = read()
        except Exception:
            continue
        if found:
            print(json.dumps(found))
            return
    print("[]")


if __name__ == "__main__":
    main()
