"""The bank: every module at every width, quantized once, stored packed, one safetensors file a module.

Candidate tensors are named as in a checkpoint, with the width in front: `w3.weight_packed`, `w3.weight_scale`, ...
The 16-bit candidate is the source weight and is not stored.
"""

from typing import ClassVar

from pydantic import Field, model_validator

from allocator.contract.channel_blocks import ChannelOrder
from allocator.contract.documents import Digest, Document, Strict
from allocator.contract.layout import Dtype16, ModuleFormat, TensorSpec, module_tensors

__all__ = ["BANK_NAME", "Bank", "BankModule", "ModelReference", "candidate_tensors"]

BANK_NAME = "bank.json"


class ModelReference(Strict):
    """The source model: `digest` identifies it, the rest is for people. `quantized_by`: the method, where the source's
    files were quantized already and dequantized on reading (`fp8`)."""

    name: str
    architecture: str
    digest: Digest
    quantized_by: str | None = None


class BankModule(Strict):
    """The stored candidates of one module: one format a width, all of one shape."""

    file: str
    file_digest: Digest
    candidates: list[ModuleFormat] = Field(min_length=1)


class Bank(Document):
    """`bank.json`."""

    SCHEMA: ClassVar[str] = "gamma.bank"

    model: ModelReference
    dtype: Dtype16
    quantizer: str
    group_size: int
    symmetric: bool
    calibration_digest: Digest | None = None
    channel_order: ChannelOrder | None = None
    modules: dict[str, BankModule]

    @model_validator(mode="after")
    def _one_shape(self) -> "Bank":
        for name, module in self.modules.items():
            widths = [c.num_bits for c in module.candidates]
            if len({c.shape for c in module.candidates}) != 1 or len(set(widths)) != len(widths) or 16 in widths:
                raise ValueError(f"{name}: candidates must have one shape and different widths below 16")
        return self


def candidate_tensors(candidate: ModuleFormat, dtype: Dtype16) -> list[TensorSpec]:
    """The tensors of one candidate inside its module's bank file."""
    return module_tensors(f"w{candidate.num_bits}", candidate, dtype)
