"""What a store offers: one entry for each scores file, naming its model, its bank and where the model lies."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from allocator.contract.bank import ModelReference
from allocator.contract.documents import Digest, Document, Strict

__all__ = ["Entry", "ModelName", "Source"]

ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


class Source(Strict):
    """Where the 16-bit model lies: in the store itself, in a folder, or on the Hugging Face hub (`org/name`)."""

    kind: Literal["store", "folder", "hub"]
    location: str | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _located(self) -> "Source":
        if (self.location is None) != (self.kind == "store"):
            raise ValueError(f"a source of kind {self.kind} has {'no' if self.kind == 'store' else 'a'} location")
        return self


class Entry(Document):
    """`entries/<scores digest>.json`. `config` is the model's config.json, which plans are made from.

    `feasible_bytes` are the smallest and the largest checkpoint, all tensors counted.
    """

    SCHEMA: ClassVar[str] = "gamma.store_entry"

    name: ModelName
    model: ModelReference
    config: dict[str, Any]
    source: Source
    scores_digest: Digest
    bank_digest: Digest
    method: str
    unit: str
    quantizer: str
    group_size: int
    symmetric: bool
    widths: list[int]
    modules: int = Field(ge=1)
    feasible_bytes: tuple[int, int]
    added: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
