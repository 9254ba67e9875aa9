"""What this pod serves. `--node` prepares its folder once, in a process of its own, while the service already answers;
`--prepared` tells of a folder that an init container filled."""

import asyncio
import contextlib
import json
import sys
from pathlib import Path

from allocator.contract.errors import ContractError, InputError
from allocator.plan import Plan
from allocator.run.progress import Standing
from allocator.run.progress_lines import standing_of
from allocator.sidecar.logs import Log
from allocator.sidecar.metrics import Metrics
from allocator.sidecar.node_cache import IN_USE_NAME, hold
from allocator.sidecar.prepared import read_prepared
from allocator.sidecar.schemas import NodeStatus
from allocator.sidecar.settings import PrepareSettings, ServiceSettings

__all__ = ["Node"]


class Node:
    """`status` is "off" for a service of no pod; with --node "preparing", then "ready" or "failed"; with --prepared
    "ready", or "off" where the folder tells nothing: then vLLM serves it all the same, and so this does not stand in
    its way. `metrics` get manifest and headroom of what is served, of nothing else.
    """

    def __init__(self, settings: ServiceSettings, metrics: Metrics, log: Log) -> None:
        self._settings, self._metrics, self._log = settings, metrics, log
        self._task: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self.status = NodeStatus(state="off" if settings.node is None else "preparing")
        if settings.node is not None and settings.node_out is None:
            raise InputError("--node needs --out DIR, where checkpoint and vllm.yaml go")
        if settings.node is not None and settings.prepared is not None:
            raise InputError("--node prepares a folder, --prepared has one; give one of them")
        if settings.prepared is not None:
            self._take(settings.prepared)
            if (settings.prepared / IN_USE_NAME).exists():
                hold(settings.prepared)  # for as long as this service lives, also while vLLM starts again

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
        command += _options(settings)
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
        await output
        assert self._settings.node_out is not None
        await asyncio.to_thread(self._take, self._settings.node_out)

    def _take(self, folder: Path) -> None:
        """Tell of what `gamma prepare` wrote into `folder`."""
        try:
            prepared = read_prepared(folder)
            plan = Plan.read(folder / "plan.json") if (folder / "plan.json").exists() else None
        except (OSError, ContractError) as error:
            message = f"{folder} tells nothing of what is served: {error}"
            self.status = NodeStatus(state="off", message=message[:2000])
            self._log("warning", "nothing prepared", reason=message)
            return
        self.status = NodeStatus(
            state="ready", message=prepared.reason, progress=1.0, manifest_digest=prepared.manifest_digest,
            checkpoint=prepared.checkpoint, vllm_arguments=prepared.vllm_arguments,
        )  # fmt: skip
        name = prepared.vllm_arguments["served-model-name"]
        self._metrics.manifest.labels(name, prepared.manifest_digest, "prepared").set(1)
        if plan is not None:
            headroom = plan.weight_budget_bytes - plan.smallest_weight_bytes
            self._metrics.headroom.labels(name, plan.device.name).set(headroom)
        self._log("info", "prepared", checkpoint=prepared.checkpoint, manifest=prepared.manifest_digest)


def _standing(line: str) -> Standing | None:
    try:
        return standing_of(json.loads(line))
    except (ValueError, TypeError, AttributeError):
        return None  # an error or a message


def _options(settings: PrepareSettings) -> list[str]:
    """The command line that `prepare_settings` reads back."""
    lora = settings.lora
    modules = None if lora is None or lora.target_modules is None else ",".join(lora.target_modules)
    given = {
        "--gpu": settings.gpu,
        "--gpu-memory": settings.gpu_memory_bytes,
        "--tensor-parallel-size": settings.tensor_parallel_size,
        "--pipeline-parallel-size": settings.pipeline_parallel_size,
        "--max-model-len": settings.max_model_len,
        "--max-num-seqs": settings.max_num_seqs,
        "--max-num-batched-tokens": settings.max_num_batched_tokens,
        "--kv-cache-dtype": settings.kv_cache_dtype,
        "--gpu-memory-utilization": settings.gpu_memory_utilization,
        "--budget": settings.budget,
        "--fusion": settings.fusion,
        "--served-model-name": settings.served_model_name,
        "--max-loras": None if lora is None else lora.max_loras,
        "--max-lora-rank": None if lora is None else lora.max_lora_rank,
        "--lora-target-modules": modules,
    }
    flags = {
        "--enable-lora": lora is not None,
        "--enable-expert-parallel": settings.expert_parallel,
        "--enforce-eager": settings.enforce_eager,
    }
    words = [f"{name}={value}" for name, value in given.items() if value is not None]
    words += [name for name, wanted in flags.items() if wanted]
    return words + [f"--vllm-arg={argument}" for argument in settings.vllm_args]
