"""`plan.json`: the plan as a document."""

from typing import ClassVar, Literal

from pydantic import Field

from allocator.contract.documents import Document, Strict
from allocator.contract.resident import Residency
from allocator.fitting.request import PlanRequest

__all__ = ["Advice", "Basis", "Capacity", "DeviceMemory", "Line", "Plan", "UniformWidth", "Verdict"]

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
    """The device as the plan saw it; see `allocator.fitting.catalogue.Device`."""

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
