"""What a worker of vLLM says of its own memory.

Mixed into the worker by `--worker-extension-cls`, so that it runs where the numbers are, in every rank.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["ProbeWorker"]


class ProbeWorker:
    """Methods that `gamma_vllm.probe` calls in every worker; `self` is the worker."""

    def gamma_probe_start(self) -> None:
        """Forget the highest resident memory of the process, so that what follows can be measured."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.gamma_probe_before = _process_memory("VmRSS")

    def gamma_probe(self) -> dict[str, Any]:
        """Bytes of this rank, read after the engine has started and answered once.

        weights: parameters (the CPU backend packs 16-bit linear layers anew, which are not seen); loaded: what loading
        took from the device; consumed: all that is gone from it after vLLM's profile run; activations: the peak above
        that; graphs: what vLLM sets aside for CUDA graphs; kv_cache: what it gave to the KV cache. The CPU backend has
        no profile run: consumed is the process's memory before the first answer, activations its rise during it.
        """
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        config: Any = self.vllm_config  # type: ignore[attr-defined]
        found = {
            "rank": int(self.rank),  # type: ignore[attr-defined]
            "weights": _parameter_bytes(runner.model),
            "kv_cache": _unique_bytes(_flat(runner.kv_caches)),
            "num_blocks": int(config.cache_config.num_gpu_blocks or 0),
            "block_size": int(config.cache_config.block_size),
        }
        if hasattr(self, "init_snapshot"):
            return found | self._of_device(runner, config)
        before, peak = self.gamma_probe_before, _process_memory("VmHWM")
        return found | {
            "total": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "requested": int(self.requested_cpu_memory),  # type: ignore[attr-defined]
            "loaded": found["weights"],
            "consumed": before,
            "activations": max(peak - before, 0),
            "graphs": 0,
            "available": found["kv_cache"],
        }

    def _of_device(self, runner: Any, config: Any) -> dict[str, int]:
        import vllm.envs as envs

        worker: Any = self
        graphs = int(getattr(worker, "cudagraph_memory_estimate", 0))
        counted = graphs if envs.VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS else 0
        return {
            "total": int(worker.init_snapshot.total_memory),
            "requested": int(worker.requested_memory),
            "loaded": int(runner.model_memory_usage),
            "consumed": int(worker.total_consumed),
            "activations": int(worker.peak_activation_memory) - counted,
            "graphs": counted,
            "available": int(worker.available_kv_cache_memory_bytes),
        }


def _parameter_bytes(model: torch.nn.Module) -> int:
    return _unique_bytes(list(model.parameters()))


def _unique_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages of `tensors`, each counted once."""
    storages = {(s := t.untyped_storage()).data_ptr(): s.nbytes() for t in tensors if t.device.type != "meta"}
    return sum(storages.values())


def _flat(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    return [tensor for value in values or [] for tensor in _flat(value)]


def _process_memory(field: str) -> int:
    """A line of /proc/self/status in bytes, 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0
