"""The lines of a plan: device memory, what vLLM may use of it, and what each part takes."""

from collections.abc import Mapping
from dataclasses import dataclass

from allocator.fitting import memory
from allocator.fitting.catalogue import Device
from allocator.fitting.document import Basis, Line
from allocator.fitting.kv_cache import KvPool, kv_pools
from allocator.fitting.lora import lora_activation_bytes, lora_bytes
from allocator.fitting.request import PlanRequest, default_batched_tokens
from allocator.inventory.shape import ModelShape

__all__ = ["PROBED", "Ledger", "batched_tokens", "ledger"]

PROBED = (
    "LoRA adapters",
    "activations",
    "cuda graphs",
    "non-torch",
    "attention workspace",
    "position tables",
    "slack",
)
"""Lines that a probe on the real device can replace."""


@dataclass(frozen=True)
class Ledger:
    """The lines, the KV pools of the pipeline stages, and `budget`, the bytes left for the weights of a rank."""

    lines: list[Line]
    pools: list[KvPool]
    kv_bytes: int
    budget: int


def batched_tokens(request: PlanRequest, device: Device) -> int:
    """Tokens of one batch: as asked for, or what `vllm serve` takes on the device."""
    return request.max_num_batched_tokens or default_batched_tokens(device.cuda_bytes, device.name)


def ledger(shape: ModelShape, device: Device, request: PlanRequest, probe: Mapping[str, int]) -> Ledger:
    """All lines of a checked request; `probe` replaces those of `PROBED` by measured bytes."""
    assert request.max_model_len is not None
    tokens = batched_tokens(request, device)
    pools = kv_pools(shape, request, tokens)
    # vLLM takes the ceiling of the product (`request_memory`); utilizations have at most six digits here.
    allowed = -(-device.cuda_bytes * round(request.gpu_memory_utilization * 10**6) // 10**6)
    kv = max(pool.bytes_for(request.cached_sequences, request.max_model_len) for pool in pools)
    lines = [
        _line("device memory", device.total_bytes, "exact", "as the driver reports"),
        _line("CUDA memory", device.cuda_bytes, device.basis, "what vLLM sees"),
        _line("vLLM may use", allowed, device.basis, f"utilization {request.gpu_memory_utilization:g}"),
        _line("KV cache", kv, "exact", f"{request.cached_sequences} x {request.max_model_len} tokens"),
        *_adapters(shape, request, probe),
        *_overheads(shape, device, request, tokens, probe),
    ]
    budget = allowed - sum(line.nbytes for line in lines[3:])
    lines.append(_line("left for weights", budget, "formula", "a rank, after loading"))
    return Ledger(lines, pools, kv, budget)


def _adapters(shape: ModelShape, request: PlanRequest, probe: Mapping[str, int]) -> list[Line]:
    if request.lora is None:
        return []
    name, note = "LoRA adapters", f"{request.lora.max_loras} of rank {request.lora.max_lora_rank}"
    if name in probe:
        return [_line(name, probe[name], "probe", note)]
    return [_line(name, lora_bytes(shape, request), "exact", note)]


def _overheads(
    shape: ModelShape, device: Device, request: PlanRequest, tokens: int, probe: Mapping[str, int]
) -> list[Line]:
    blackwell = device.capability is not None and device.capability[0] == 10
    activations = memory.activation_bytes(shape, request, tokens) + lora_activation_bytes(request, tokens)
    predicted: dict[str, tuple[int, Basis, str]] = {
        "activations": (activations, "formula", f"{tokens} tokens at once"),
        "cuda graphs": (memory.cuda_graph_bytes(shape, request, tokens, blackwell), "measured", ""),
        "non-torch": (memory.non_torch_bytes(request), "measured", ""),
        "attention workspace": (memory.attention_workspace_bytes(request, device.capability), "formula", ""),
        "position tables": (memory.position_bytes(shape), "formula", ""),
        "slack": (memory.slack_bytes(shape), "formula", "of the allocator"),
    }
    return [
        _line(name, probe[name], "probe", note) if name in probe else _line(name, nbytes, basis, note)
        for name, (nbytes, basis, note) in predicted.items()
    ]


def _line(name: str, nbytes: int, basis: Basis, note: str = "") -> Line:
    return Line(name=name, nbytes=nbytes, basis=basis, note=note)
