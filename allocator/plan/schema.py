"""What a plan is asked for (the traffic, and how vLLM will be started), and `plan.json`, what it answers."""

from typing import ClassVar, Literal

from pydantic import Field

from allocator.contract.documents import Document, Strict
from allocator.contract.errors import InputError
from allocator.contract.resident import Kernel, Ranks, Residency
from allocator.model.shape import ModelShape

__all__ = [
    "KV_CACHE_DTYPES",
    "LORA_RANKS",
    "Advice",
    "Basis",
    "Capacity",
    "DeviceMemory",
    "Line",
    "LoraRequest",
    "Plan",
    "PlanRequest",
    "UniformWidth",
    "Verdict",
    "check_request",
    "default_batched_tokens",
    "default_num_seqs",
]

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
KV_CACHE_DTYPES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2")

CONTEXT_BYTES = 530 << 20
"""Memory in use when vLLM looks at the device first, its own CUDA context: 0.51 GiB in the logs that `memory` cites."""

_FP8_CAPABILITY = (8, 0)
_DEFAULT_UTILIZATION = 0.92


class LoraRequest(Strict):
    """`--enable-lora` and its options, named as in vLLM: adapters in one batch, their largest rank, and the modules
    that have adapters by the last part of their names (None: all)."""

    max_loras: int = Field(default=1, ge=1, le=1 << 12)
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 16
    target_modules: list[str] | None = Field(default=None, min_length=1)


class PlanRequest(Strict):
    """Arguments of `vllm serve` that decide about memory; defaults are vLLM's where it has one.

    `max_model_len` None means the model's own; `max_num_batched_tokens` None what vLLM takes on the device.
    `kv_sequences` are the sequences of `max_model_len` tokens that the KV cache must hold, None all `max_num_seqs`.
    `kernel` is the one that will multiply (humming on CUDA).
    """

    max_model_len: int | None = Field(default=None, ge=1, le=1 << 40)
    max_num_seqs: int = Field(default=1, ge=1, le=1 << 16)
    kv_sequences: int | None = Field(default=None, ge=1, le=1 << 16)
    max_num_batched_tokens: int | None = Field(default=None, ge=1, le=1 << 22)
    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2"] = "auto"
    tensor_parallel_size: int = Field(default=1, ge=1, le=1024)
    pipeline_parallel_size: int = Field(default=1, ge=1, le=1024)
    expert_parallel: bool = False
    gpu_memory_utilization: float = Field(default=0.92, gt=0, le=1)
    block_size: int = Field(default=16, ge=1, le=1024)
    enforce_eager: bool = False
    kernel: Kernel = "humming"
    lora: LoraRequest | None = None

    @property
    def cached_sequences(self) -> int:
        """Sequences of `max_model_len` tokens that the KV cache must hold."""
        return self.max_num_seqs if self.kv_sequences is None else self.kv_sequences

    @property
    def ranks(self) -> Ranks:
        return Ranks(self.tensor_parallel_size, self.expert_parallel)

    @property
    def kv_element_bytes(self) -> int:
        return 1 if self.kv_cache_dtype.startswith("fp8") else 2


def default_batched_tokens(cuda_bytes: int, name: str = "") -> int:
    """What `vllm serve` takes for `--max-num-batched-tokens` (`EngineArgs`, by memory and name of the device)."""
    if cuda_bytes >= 160 << 30:
        return 16384
    if cuda_bytes >= 70 << 30 and "a100" not in name.lower():
        return 8192
    return 2048


def default_num_seqs(cuda_bytes: int, name: str = "") -> int:
    """What `vllm serve` takes for `--max-num-seqs`, likewise."""
    return 1024 if default_batched_tokens(cuda_bytes, name) > 2048 else 256


def check_request(
    request: PlanRequest, shape: ModelShape, capability: tuple[int, int] | None, cuda_bytes: int | None = None
) -> PlanRequest:
    """`request` with the model's own context length filled in.

    Raises InputError for what vLLM would refuse: a context beyond the model's, heads or sizes that the ranks do
    not divide, more stages than blocks, an fp8 KV cache on a GPU without kernels for it, a utilization above the
    default that leaves no room for the CUDA context.
    """
    utilization = request.gpu_memory_utilization
    if cuda_bytes is not None and utilization > _DEFAULT_UTILIZATION:
        possible = max(1 - CONTEXT_BYTES / cuda_bytes, 0)
        if utilization > possible:
            raise InputError(
                f"--gpu-memory-utilization {utilization:g} leaves less than the {CONTEXT_BYTES >> 20} MiB that CUDA "
                f"takes before vLLM starts; give at most {max(int(possible * 1000) / 1000, _DEFAULT_UTILIZATION):g}"
            )
    context = shape.context
    if request.max_model_len is None:
        request = request.model_copy(update={"max_model_len": context.default})
    elif request.max_model_len > context.longest:
        more = f". {context.hint}" if context.hint else ""
        raise InputError(
            f"--max-model-len {request.max_model_len} is beyond the model's {context.longest} ({context.reason}); "
            f"give at most {context.longest}{more}"
        )
    size = request.tensor_parallel_size
    if shape.heads.query % size:
        raise InputError(
            f"--tensor-parallel-size {size} does not divide the model's {shape.heads.query} attention heads; "
            f"possible are {', '.join(map(str, shape.heads.rank_counts()))}"
        )
    if request.expert_parallel and shape.experts is None:
        raise InputError(f"--enable-expert-parallel: {shape.architecture} has no experts; leave it out")
    if request.pipeline_parallel_size > shape.blocks:
        raise InputError(
            f"--pipeline-parallel-size {request.pipeline_parallel_size} is more than the model's {shape.blocks} blocks"
        )
    if request.kv_element_bytes == 1 and capability is not None and capability < _FP8_CAPABILITY:
        raise InputError(
            f"--kv-cache-dtype {request.kv_cache_dtype} needs compute capability "
            f"{_FP8_CAPABILITY[0]}.{_FP8_CAPABILITY[1]} or newer, this GPU has "
            f"{capability[0]}.{capability[1]}; use --kv-cache-dtype auto"
        )
    return request


Basis = Literal["exact", "formula", "measured", "probe"]


class Line(Strict):
    """One part of the device memory of a rank. `basis`: exact (arithmetic of the contract), formula, measured
    (a public table), probe (this device)."""

    name: str
    nbytes: int
    basis: Basis
    note: str = ""


class UniformWidth(Strict):
    """All modules that can be quantized at one width: bytes of the tightest rank, and whether they fit."""

    num_bits: int
    nbytes: int
    fits: bool


class Capacity(Strict):
    """The KV cache of a rank once the weights are `weight_bytes`: blocks as vLLM logs them, sequences of
    max_model_len that fit at once."""

    weight_bytes: int
    kv_bytes: int
    num_blocks: int = Field(ge=0)
    tokens: int = Field(ge=0)
    sequences: int = Field(ge=0)


class Advice(Strict):
    """A change that alone makes the plan fit: the option of `gamma plan`, its value, and a sentence."""

    option: str
    value: str
    message: str


class Verdict(Strict):
    """`needs_bytes` are missing (0 if it fits); `average_bits` is what the budget gives each quantizable weight."""

    fits: bool
    message: str
    needs_bytes: int = Field(ge=0)
    average_bits: float | None = None


class DeviceMemory(Strict):
    """The device as the plan saw it; see `allocator.plan.gpus.Device`."""

    name: str
    total_bytes: int
    cuda_bytes: int
    basis: Basis
    compute_capability: str | None = None
    product_label: str | None = None
    resource: str = "nvidia.com/gpu"


class Plan(Document):
    """`plan.json`. All bytes are of one rank, the tightest. `weight_budget_bytes` is the most that the weights
    may take after loading; it can be negative. `planned` is the capacity with the given checkpoint, or with
    weights that fill the budget."""

    SCHEMA: ClassVar[str] = "gamma.plan"

    model: str
    architecture: str
    parameters: int
    device: DeviceMemory
    request: PlanRequest
    batched_tokens: int
    lines: list[Line]
    kv_bytes_per_block: int
    kv_blocks_per_sequence: int
    residency: Residency
    weight_budget_bytes: int
    smallest_weight_bytes: int
    uniform: list[UniformWidth]
    planned: Capacity | None = None
    verdict: Verdict
    advice: list[Advice]

    def line(self, name: str) -> Line:
        """Raises KeyError."""
        for line in self.lines:
            if line.name == name:
                return line
        raise KeyError(name)
