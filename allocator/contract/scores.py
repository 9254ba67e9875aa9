"""Scores: what each width of each module costs in loss. Solving for a new budget needs only this file."""

from typing import Any, ClassVar

from pydantic import Field, model_validator

from allocator.contract.bank import ModelReference
from allocator.contract.documents import Digest, Document, Strict
from allocator.contract.layout import Dtype16, ModuleFormat, module_bytes

__all__ = ["Candidate", "ScoredModule", "Scores"]


class Candidate(Strict):
    """One width of one module: its storage, its exact bytes, and its score (lower is better, in `Scores.unit`)."""

    format: ModuleFormat
    nbytes: int = Field(ge=0)
    score: float

    @model_validator(mode="after")
    def _bytes_follow_from_format(self) -> "Candidate":
        expected = module_bytes(self.format)
        if self.nbytes != expected:
            raise ValueError(f"{self.nbytes} bytes at {self.format.num_bits} bits, its format has {expected}")
        return self


class ScoredModule(Strict):
    """All candidates of one module. `fused_group` is the layer that vLLM joins it into."""

    fused_group: str | None = None
    candidates: list[Candidate] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_shape(self) -> "ScoredModule":
        widths = [c.format.num_bits for c in self.candidates]
        if len({c.format.shape for c in self.candidates}) != 1 or len(set(widths)) != len(widths):
            raise ValueError("the candidates of a module must have one shape and different widths")
        return self


class Scores(Document):
    """`scores.json`. `other_bytes` counts every tensor that is no module of the program (norms, biases)."""

    SCHEMA: ClassVar[str] = "gamma.scores"

    model: ModelReference
    bank_digest: Digest
    dtype: Dtype16
    method: str
    unit: str
    settings: dict[str, Any]
    other_bytes: int = Field(ge=0)
    modules: dict[str, ScoredModule]

    def feasible_bytes(self) -> tuple[int, int]:
        """Smallest and largest checkpoint, in bytes of tensors."""
        sizes = [[c.nbytes for c in m.candidates] for m in self.modules.values()]
        return self.other_bytes + sum(map(min, sizes)), self.other_bytes + sum(map(max, sizes))
