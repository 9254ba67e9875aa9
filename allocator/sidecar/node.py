"""`--node`: prepares this pod's folder once, in a process of its own, while the service already answers."""

import asyncio
import contextlib
import json
import sys

from allocator.contract.errors import InputError
from allocator.progress import Standing
from allocator.progress_lines import standing_of
from allocator.sidecar.logs import Log
from allocator.sidecar.metrics import Metrics
from allocator.sidecar.schemas import NodeStatus
from allocator.sidecar.settings import PrepareSettings, ServiceSettings

__all__ = ["Node"]


class Node:
    """`status` is "off" without --node, else "preparing", then "ready" or "failed"."""

    def __init__(self, settings: ServiceSettings, metrics: Metrics, log: Log) -> None:
        self._settings, self._metrics, self._log = settings, metrics, log
        self._task: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self.status = NodeStatus(state="off" if settings.node is None else "preparing")
        if settings.node is not None and settings.node_out is None:
            raise InputError("--node needs --out DIR, where checkpoint and vllm.yaml go")

    @property
    def ready(self) -> bool:
        return self.status.state in ("off", "ready")

    def start(self) -> None:
        if self._settings.node is not None:
            self._task = asyncio.create_task(self._prepare(self._settings.node))

    async def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _prepare(self, settings: PrepareSettings) -> None:
        """Runs `gamma prepare` as the init container would, and keeps what it says."""
        command = [sys.executable, "-m", "allocator.cli.main", "prepare", settings.model, "--json"]
        command += ["--progress", "json"]
        command += ["--store", self._settings.store, "--out", str(self._settings.node_out)]
        command += [part for name, value in _options(settings).items() for part in (name, str(value))]
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        output = asyncio.create_task(self._process.stdout.read())
        last = ""
        while line := await self._process.stderr.readline():
            text = line.decode("utf-8", "replace").strip()
            standing = _standing(text)
            if standing is not None:
                told = {"step": standing.step, "progress": standing.share, "standing": standing}
                self.status = self.status.model_copy(update=told)
            else:
                last = text or last
        code = await self._process.wait()
        if code:
            message = last.removeprefix("gamma prepare: ")
            self.status = NodeStatus(state="failed", message=message[:2000])
            self._log("error", "prepare failed", code=code, reason=message)
            return
        prepared = json.loads(await output)
        self.status = NodeStatus(
            state="ready", message=prepared["reason"], progress=1.0, manifest_digest=prepared["manifest_digest"],
            checkpoint=prepared["checkpoint"], vllm_arguments=prepared["vllm_arguments"],
        )  # fmt: skip
        name = prepared["vllm_arguments"]["served-model-name"]
        self._metrics.manifest.labels(name, prepared["manifest_digest"], "prepared").set(1)
        self._log("info", "prepared", checkpoint=prepared["checkpoint"], manifest=prepared["manifest_digest"])


def _standing(line: str) -> Standing | None:
    try:
        return standing_of(json.loads(line))
    except (ValueError, TypeError, AttributeError):
        return None  # an error or a message


def _options(settings: PrepareSettings) -> dict[str, object]:
    given = {
        "--gpu": settings.gpu,
        "--gpu-memory": settings.gpu_memory_bytes,
        "--tensor-parallel-size": settings.tensor_parallel_size,
        "--max-model-len": settings.max_model_len,
        "--max-num-seqs": settings.max_num_seqs,
        "--kv-cache-dtype": settings.kv_cache_dtype,
        "--gpu-memory-utilization": settings.gpu_memory_utilization,
        "--budget": settings.budget,
        "--served-model-name": settings.served_model_name,
    }
    return {name: value for name, value in given.items() if value is not None}
