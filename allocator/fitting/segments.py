"""The distinct products of a checkpoint on one rank: what a library that compiles for each shape has to compile."""

from pydantic import Field

from allocator.contract.documents import Strict
from allocator.contract.errors import InputError
from allocator.fitting.model import PlannedModel
from allocator.fitting.request import PlanRequest
from allocator.fitting.weights import check_formats, residency_of

__all__ = ["WarmupSegment", "distinct_segments"]


class WarmupSegment(Strict):
    """One product: rows and columns on a rank, storage, and how many places of the model have it."""

    rows: int = Field(ge=1)
    columns: int = Field(ge=1)
    num_bits: int
    group_size: int
    symmetric: bool
    count: int = Field(ge=1)


def distinct_segments(model: PlannedModel, tensor_parallel_size: int = 1) -> list[WarmupSegment]:
    """Raises InputError when `model` is no gamma checkpoint or the ranks do not divide a module."""
    if model.formats is None:
        raise InputError(f"{model.name}: no gamma checkpoint (config.json has no quantization_config of ours)")
    check_formats(model.shape, model.formats)
    residency = residency_of(model.shape, PlanRequest(tensor_parallel_size=tensor_parallel_size))
    counts: dict[tuple[int, int, int, int, bool], int] = {}
    for module, rows, columns in residency.segments(model.formats):
        if module.quantized:
            key = (rows, columns, module.num_bits, module.group_size or 0, bool(module.symmetric))
            counts[key] = counts.get(key, 0) + 1
    return [
        WarmupSegment(rows=r, columns=c, num_bits=b, group_size=g, symmetric=s, count=counts[r, c, b, g, s])
        for r, c, b, g, s in sorted(counts)
    ]
