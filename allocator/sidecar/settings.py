"""What users and operators set: for preparing a folder, and for the service."""

from typing import Literal

from pydantic import Field

from allocator.contract.documents import Strict

__all__ = ["PrepareSettings"]


class PrepareSettings(Strict):
    """What a user asks of `gamma prepare`. `gpu` and `budget` may be "auto"; an explicit value always wins."""

    model: str
    gpu: str = "auto"
    gpu_memory_bytes: int | None = Field(default=None, ge=1)
    tensor_parallel_size: int = Field(default=1, ge=1)
    max_model_len: int | None = Field(default=None, ge=1)
    max_num_seqs: int | None = Field(default=None, ge=1)
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    budget: str = "auto"
    served_model_name: str | None = None
