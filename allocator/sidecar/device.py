"""The GPU that this process can see, read in a short-lived process so that no driver is ever loaded into ours.

`python -m allocator.sidecar.device` is that process: NVML if nvidia-ml-py is installed, else nvidia-smi.
"""

import json
import shutil
import subprocess
import sys

from pydantic import Field, ValidationError

from allocator.contract.documents import Strict

__all__ = ["Device", "read_devices"]

_SECONDS = 20.0


class Device(Strict):
    """One visible GPU. `memory_bytes` is what the driver reports as total (of the MIG slice, if it is one)."""

    name: str
    memory_bytes: int = Field(ge=1)
    compute_capability: str | None = None


def read_devices(timeout_seconds: float = _SECONDS) -> list[Device]:
    """The visible GPUs in the order of their index, empty when there is none or reading fails. Never raises."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "allocator.sidecar.device"],
            capture_output=True, text=True, timeout=timeout_seconds, check=False,
        )  # fmt: skip
        return [Device.model_validate(item) for item in json.loads(done.stdout)]
    except (OSError, subprocess.SubprocessError, ValueError, ValidationError):
        return []


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
