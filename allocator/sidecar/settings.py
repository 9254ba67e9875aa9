"""What users and operators set: for preparing a folder, and for the service."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from allocator.contract.documents import Strict
from allocator.contract.errors import InputError
from allocator.plan.fusion import AskedFusion
from allocator.plan.schema import LoraRequest

__all__ = ["PrepareSettings", "ServiceSettings", "is_loopback"]


class PrepareSettings(Strict):
    """What a user asks of `gamma prepare`. `gpu` and `budget` may be "auto"; an explicit value always wins.

    Without `max_num_seqs` vLLM runs as many sequences as it does by default, and the KV cache holds one of
    `max_model_len` tokens at least. Stages of a pipeline are taken to be on nodes of their own, with GPUs like these.
    `vllm_args` are what `vllm serve` gets besides; they may not contradict the plan.
    """

    model: str
    gpu: str = "auto"
    gpu_memory_bytes: int | None = Field(default=None, ge=1)
    tensor_parallel_size: int = Field(default=1, ge=1)
    pipeline_parallel_size: int = Field(default=1, ge=1)
    max_model_len: int | None = Field(default=None, ge=1)
    max_num_seqs: int | None = Field(default=None, ge=1)
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    kv_cache_dtype: Literal["auto", "fp8", "auto-choose"] = "auto"
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    expert_parallel: bool = False
    enforce_eager: bool = False
    lora: LoraRequest | None = None
    budget: str = "auto"
    fusion: AskedFusion = "auto"
    served_model_name: str | None = None
    vllm_args: list[str] = Field(default_factory=list)


@dataclass(frozen=True)
class ServiceSettings:
    """How the service runs. Raises InputError for what is not safe or not possible.

    `solvers` processes solve; `solver_queue` requests may wait for them, `job_queue` checkpoints may wait or be made.
    `checkpoints` is where checkpoints go; by default into a store that is a folder. `prepared` is a folder that
    `gamma prepare` filled for the server beside this service.
    """

    store: str
    host: str = "127.0.0.1"
    port: int = 8080
    token_files: tuple[Path, ...] = ()
    read_only: bool = False
    checkpoints: Path | None = None
    solvers: int = 2
    solver_queue: int = 32
    solver_seconds: float = 20.0
    job_queue: int = 8
    body_bytes: int = 1 << 20
    body_seconds: float = 10.0
    header_seconds: float = 10.0
    memory_bytes: int = 32 << 20
    log_level: str = "info"
    node: PrepareSettings | None = None
    node_out: Path | None = None
    prepared: Path | None = None
    allowed_hosts: tuple[str, ...] = field(default=("localhost", "127.0.0.1", "::1"))

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise InputError(f"--port {self.port}: allowed are 0 to 65535")
        limits = (
            "solvers",
            "solver_queue",
            "job_queue",
            "body_bytes",
            "solver_seconds",
            "body_seconds",
            "header_seconds",
        )
        for name in limits:
            if getattr(self, name) <= 0:
                raise InputError(f"--{name.replace('_', '-')} must be greater than 0, given {getattr(self, name)}")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a socket bound to `host`."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
