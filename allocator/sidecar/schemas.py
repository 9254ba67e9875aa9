"""What the API takes and gives. The client uses the same classes, so that the two cannot differ."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from allocator.contract.bank import ModelReference
from allocator.contract.documents import Digest
from allocator.contract.manifest import Manifest, Proof
from allocator.plan import Plan
from allocator.plan.fusion import AskedFusion
from allocator.run.progress import Standing

__all__ = [
    "Allocation", "AllocationList", "AllocationRequest", "CheckpointRequest", "Deleted", "DiffRequest", "DiffResult",
    "ErrorBody", "ErrorResponse", "Fit", "FitRequest", "GpuInfo", "GpuList", "Health", "Job", "JobList", "JobState",
    "ManifestAnswer", "ManifestInfo", "ManifestList", "MeasuredPoint", "ModelInfo", "ModelList", "NodeStatus",
    "OfAllocation", "PlanAnswer", "PlanHardware", "PlanRequestBody", "SweepPoint", "SweepRequest", "SweepResult",
    "Version",
]  # fmt: skip

ModelId = Annotated[
    str,
    Field(
        pattern=r"^(sha256:[0-9a-f]{64}|[A-Za-z0-9][A-Za-z0-9._-]{0,127})$",
        description="name in the store, or digest of a model or of scores",
        examples=["Qwen3-32B"],
    ),
]
Pattern = Annotated[str, Field(min_length=1, max_length=200)]
Width = Literal[2, 3, 4, 5, 6, 8, 16]
Rules = Annotated[dict[Pattern, Width], Field(max_length=64)]
Memory = Annotated[
    str, Field(min_length=1, max_length=40, description="bytes: 123456789, 5.9GiB or 6GB", examples=["24GiB"])
]
Amount = Annotated[
    str,
    Field(
        min_length=1, max_length=40, description="bytes (123456789, 5.9GiB, 6GB), or average bits: 3.5bits",
        examples=["18GiB"],
    ),
]  # fmt: skip
AverageBits = Annotated[
    float,
    Field(
        description="stored bits a weight, scales and zero points included, over all modules that have a choice of "
        "widths, embedding and lm_head among them; what `average_bits` of a request counts"
    ),
]


def _exactly_one_of(*names: str) -> dict[str, Any]:
    """For the OpenAPI document: of these fields one has a value."""
    return {"oneOf": [{"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in names]}


_ONE_DEVICE = _exactly_one_of("gpu", "gpu_memory")
_ONE_BUDGET = _exactly_one_of("budget", "average_bits", "plan")


class Body(BaseModel):
    """Base of requests: unknown keys are refused, values are never coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Answer(BaseModel):
    """Base of responses."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PlanHardware(Body):
    """The hardware, and how vLLM is started on it; defaults are vLLM's."""

    model_config = ConfigDict(json_schema_extra=_ONE_DEVICE)

    gpu: str | None = Field(default=None, max_length=80, examples=["l4"], description="a GPU of /v1/gpus")
    gpu_memory: Memory | None = Field(default=None, description="memory of one GPU instead of a name")
    max_model_len: int | None = Field(default=None, ge=1, le=1 << 26, description="default: what the model allows")
    max_num_seqs: int = Field(default=1, ge=1, le=1 << 16, description="sequences of max_model_len that must fit")
    max_num_batched_tokens: int | None = Field(default=None, ge=1, le=1 << 22)
    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2"] = "auto"
    tensor_parallel_size: int = Field(default=1, ge=1, le=1024)
    gpu_memory_utilization: float = Field(default=0.92, gt=0, le=1)
    enforce_eager: bool = False

    @model_validator(mode="after")
    def _one_device(self) -> "PlanHardware":
        if (self.gpu is None) == (self.gpu_memory is None):
            raise ValueError("give exactly one of gpu and gpu_memory")
        return self


class PlanRequestBody(PlanHardware):
    """`POST /v1/plans`. With `manifest` the plan is of that assignment: what it leaves for the KV cache."""

    model: ModelId
    manifest: Digest | None = Field(default=None, description="of an allocation made before")


class AllocationRequest(Body):
    """`POST /v1/allocations`: a model, and exactly one of `budget`, `average_bits` and `plan`."""

    model_config = ConfigDict(json_schema_extra=_ONE_BUDGET)

    model: ModelId
    budget: Amount | None = None
    average_bits: float | None = Field(default=None, gt=0, le=16)
    plan: PlanHardware | None = Field(default=None, description="the budget is what the hardware leaves for weights")
    pins: Rules = Field(default_factory=dict, description="modules (fnmatch pattern) with exactly this width")
    ceilings: Rules = Field(default_factory=dict, description="modules with at most this width")
    floors: Rules = Field(default_factory=dict, description="modules with at least this width")
    fusion: AskedFusion = Field(
        default="auto", description="auto: one width a fused layer with a plan (CUDA), free widths with a budget"
    )

    @model_validator(mode="before")
    @classmethod
    def _fusion_is_said(cls, given: Any) -> Any:
        """A request that leaves fusion out is the same as one that says what it means."""
        if isinstance(given, dict) and given.get("fusion", "auto") == "auto":
            return given | {"fusion": "free" if given.get("plan") is None else "tied"}
        return given

    @model_validator(mode="after")
    def _one_budget(self) -> "AllocationRequest":
        if sum(x is not None for x in (self.budget, self.average_bits, self.plan)) != 1:
            raise ValueError("give exactly one of budget, average_bits and plan")
        return self


class Allocation(Answer):
    """An assignment that was solved. `id` is the digest of the request, `predicted_loss` the sum of scores.

    In `request` amounts are bytes: 2MB and 2000000 are one request.
    """

    object: Literal["allocation"] = "allocation"
    id: Digest
    model: str
    model_digest: Digest
    scores_digest: Digest
    bank_digest: Digest
    manifest_digest: Digest
    request: AllocationRequest
    requested: str
    budget_bytes: int
    tensor_bytes: int
    average_bits: AverageBits
    predicted_loss: float
    unit: str
    proof: Proof | None = None
    weight_budget_bytes: int | None = Field(default=None, description="of a plan: bytes a rank may hold of weights")
    manifest: str | None = Field(
        default=None, description="with ?manifest=true: the manifest, byte for byte as `gamma solve --out` writes it"
    )

    @model_validator(mode="before")
    @classmethod
    def _read_as_stored(cls, data: Any) -> Any:
        """Stores have allocations of the time when a request could name its solver."""
        if isinstance(data, dict) and isinstance(request := data.get("request"), dict):
            data = data | {"request": {name: value for name, value in request.items() if name != "solver"}}
        return data


class FitRequest(Body):
    """`POST /v1/fits`: a model on some hardware. Without `budget` the weights get what the hardware leaves, or,
    where that is too little, the smallest assignment."""

    model: ModelId
    hardware: PlanHardware
    budget: Amount | None = None
    fusion: AskedFusion = "auto"


class SweepRequest(Body):
    """`POST /v1/sweeps`: the best assignment for `points` budgets between two, each larger by one factor."""

    model: ModelId
    smallest: Amount | None = Field(default=None, description="default: the smallest that is feasible")
    largest: Amount | None = Field(default=None, description="default: the largest that is feasible")
    points: int = Field(default=17, ge=2, le=65)
    fusion: Literal["free", "tied"] = "free"


class SweepPoint(Answer):
    """One budget. `bound`: no assignment within the budget has a smaller loss."""

    budget_bytes: int
    tensor_bytes: int
    average_bits: AverageBits
    predicted_loss: float
    bound: float


class MeasuredPoint(Answer):
    """A stored manifest of the same scores whose loss was measured: KL divergence from the original, nats a token.

    It was measured on `tokens` tokens of the text `text_digest`; a "refinement" also chose the assignment on that text.
    `uniform_loss` is what one width for all modules within the same bytes measured there.
    """

    manifest_digest: Digest
    tensor_bytes: int
    average_bits: AverageBits
    predicted_loss: float
    measured_loss: float
    record: Literal["verification", "refinement"]
    tokens: int
    text_digest: Digest
    uniform_loss: float | None = None
    uniform_bits: int | None = None


class SweepResult(Answer):
    """The Pareto curve, with one width for all modules beside it, and what was measured of stored manifests."""

    object: Literal["sweep"] = "sweep"
    id: Digest
    model: str
    scores_digest: Digest
    unit: str
    points: list[SweepPoint]
    uniform: dict[str, SweepPoint]
    measured: list[MeasuredPoint] = Field(description="of manifests that `gamma store add-manifest` brought")


class OfAllocation(Body):
    """The manifest that answers a request. It need not be in the store: what is not known is solved."""

    allocation: AllocationRequest


class DiffRequest(Body):
    """`POST /v1/diff`: two manifests of one model, by digest of the store, by request, or whole."""

    before: Digest | OfAllocation | dict[str, Any] = Field(
        description="digest of a stored manifest, the request of an allocation, or a manifest"
    )
    after: Digest | OfAllocation | dict[str, Any]


class DiffSide(Answer):
    """One of the two. `block_bits` is what `average_bits` is, but over the linear modules of the blocks alone."""

    digest: Digest
    requested: str
    budget_bytes: int
    tensor_bytes: int
    average_bits: AverageBits | None = Field(
        description="null: without scores it is not known which modules have a choice"
    )
    block_bits: float
    predicted_loss: float | None
    method: str


class DiffChange(Answer):
    """One module that is stored differently; losses are null where scores are not known."""

    module: str
    bits_before: int
    bits_after: int
    group_size_before: int | None
    group_size_after: int | None
    bytes_before: int
    bytes_after: int
    bytes_change: int
    loss_before: float | None
    loss_after: float | None
    loss_change: float | None


class DiffResult(Answer):
    """What `after` has otherwise than `before`."""

    model: ModelReference
    before: DiffSide
    after: DiffSide
    tensor_bytes_change: int
    predicted_loss_change: float | None
    unit: str | None
    modules: int
    changed: list[DiffChange]


class CheckpointRequest(Body):
    """`POST /v1/checkpoints`: the stored manifest to materialise."""

    manifest: Digest


JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class Job(Answer):
    """A checkpoint being made. `id` is the digest of what is asked for, so the same request is the same job."""

    object: Literal["job"] = "job"
    id: Digest
    kind: Literal["checkpoint"] = "checkpoint"
    state: JobState
    manifest_digest: Digest
    step: str = ""
    progress: float = Field(default=0.0, ge=0, le=1, description="share of the step that is done")
    standing: Standing | None = Field(default=None, description="while it runs: units done, time left, memory")
    attempt: int = 0
    checkpoint: str | None = Field(default=None, description="folder of the checkpoint, once it is whole")
    tensor_bytes: int
    error: str | None = None
    created: str
    updated: str


class ModelInfo(Answer):
    """One scores file on offer."""

    object: Literal["model"] = "model"
    name: str
    architecture: str
    model_digest: Digest
    scores_digest: Digest
    bank_digest: Digest
    method: str
    unit: str
    quantizer: str
    group_size: int
    symmetric: bool
    widths: list[int]
    modules: int
    feasible_bytes: list[int] = Field(min_length=2, max_length=2)
    added: str


class GpuInfo(Answer):
    """One GPU of the catalogue; `mig` are the names of its slices, to be given as `name:profile`."""

    object: Literal["gpu"] = "gpu"
    name: str
    id: str
    memory_bytes: int
    compute_capability: str
    segment: str
    product_label: str
    mig: list[str]


class ModelList(Answer):
    object: Literal["list"] = "list"
    data: list[ModelInfo]


class GpuList(Answer):
    object: Literal["list"] = "list"
    data: list[GpuInfo]


class _Page(Answer):
    """Part of a list, by id. `next` is the `after` of the next part, null at the end."""

    object: Literal["list"] = "list"
    next: str | None = None


class AllocationList(_Page):
    data: list[Allocation]


class JobList(_Page):
    data: list[Job]


class ManifestInfo(Answer):
    """One stored manifest. `measured`: it says what was measured."""

    object: Literal["manifest"] = "manifest"
    id: Digest
    model: str
    model_digest: Digest
    bank_digest: Digest
    scores_digest: Digest | None
    method: str
    requested: str
    budget_bytes: int
    tensor_bytes: int
    measured: bool


class ManifestList(_Page):
    data: list[ManifestInfo]


class Deleted(Answer):
    """What is no longer in the store."""

    object: Literal["deleted"] = "deleted"
    id: Digest
    deleted: Literal[True] = True


class PlanAnswer(Plan):
    """A plan as `gamma plan --out` writes it."""

    schema_: Literal["gamma.plan"] = Field(alias="schema")
    schema_version: Literal[1]
    digest_: Digest = Field(alias="digest")


class ManifestAnswer(Manifest):
    """A manifest as `gamma solve --out` writes it."""

    schema_: Literal["gamma.manifest"] = Field(alias="schema")
    schema_version: Literal[1]
    digest_: Digest = Field(alias="digest")


class Fit(Answer):
    """All that a page shows of one choice, so that no other answer is needed, nor the same service twice.

    `plan` is what the hardware leaves for the weights, `planned` the plan of the assignment: what is left for the KV
    cache. `allocation` has its manifest.
    """

    object: Literal["fit"] = "fit"
    plan: PlanAnswer
    allocation: Allocation
    planned: PlanAnswer


class NodeStatus(Answer):
    """What `gamma sidecar --node` prepared."""

    object: Literal["node"] = "node"
    state: Literal["off", "preparing", "ready", "failed"]
    message: str = ""
    step: str = ""
    progress: float = 0.0
    standing: Standing | None = None
    manifest_digest: str | None = None
    checkpoint: str | None = None
    vllm_arguments: dict[str, Any] | None = None


class Health(Answer):
    status: Literal["ok", "not ready"]
    message: str = ""


class Version(Answer):
    name: Literal["gamma"] = "gamma"
    version: str
    api: Literal["v1"] = "v1"


class ErrorBody(Answer):
    type: str
    message: str
    param: str | None = None


class ErrorResponse(Answer):
    """Every answer that is no success."""

    error: ErrorBody
