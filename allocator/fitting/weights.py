"""Bytes of a model's weights on the tightest rank: at one width throughout, and of a checkpoint's formats."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from allocator.contract.errors import InputError
from allocator.contract.layout import WIDTHS, ModuleFormat, usable_group_size
from allocator.contract.resident import Heads, Ranks, Split, pad, resident_bytes
from allocator.fitting.kv_cache import stage_layers
from allocator.fitting.request import PlanRequest
from allocator.inventory.shape import ModelShape, ModuleKind, OtherKind

__all__ = ["WeightSizes", "weight_sizes"]


@dataclass(frozen=True)
class WeightSizes:
    """Sizes by stage: `by_width[stage][b]` of the quantizable modules at `b` bits, `fixed[stage]` of all else."""

    shape: ModelShape
    request: PlanRequest
    stages: tuple[range, ...]
    by_width: tuple[dict[int, int], ...]
    fixed: tuple[int, ...]
    quantizable: tuple[int, ...]

    def uniform_bytes(self, num_bits: int) -> int:
        """The tightest rank with all quantizable modules at `num_bits`."""
        return max(f + sizes[num_bits] for f, sizes in zip(self.fixed, self.by_width, strict=True))

    @property
    def smallest_bytes(self) -> int:
        return self.uniform_bytes(min(WIDTHS))

    def average_bits(self, budget_bytes: int) -> float | None:
        """Stored bits a quantizable weight that `budget_bytes` on each rank allow, scales and zero points included."""
        bits = [8 * (budget_bytes - f) / n for f, n in zip(self.fixed, self.quantizable, strict=True) if n]
        most = [8 * sizes[16] / n for sizes, n in zip(self.by_width, self.quantizable, strict=True) if n]
        return min(*bits, *most) if bits else None

    def of_formats(self, formats: Mapping[str, ModuleFormat]) -> int:
        """The tightest rank with the modules of a checkpoint stored as `formats` says.

        Raises InputError when a module has no entry, or one of another shape.
        """
        totals = list(_others(self.shape, self.request.ranks, self.stages))
        for kind in self.shape.modules:
            for block in kind.blocks or (None,):
                stages = _stages_of(kind, block, self.stages)
                share = 0
                for expert in range(kind.experts or 1):
                    name = kind.name.replace("{i}", str(block)).replace("{e}", str(expert))
                    found = formats.get(name)
                    if found is None or found.shape != kind.shape:
                        given = "no entry" if found is None else f"shape {list(found.shape)}"
                        raise InputError(f"{name}: the checkpoint has {given}, config.json says {list(kind.shape)}")
                    share += _one(kind, found, self.request, self.shape.heads)
                for stage in stages:
                    totals[stage] += _on_rank(kind, share, self.request.ranks)
        return max(totals)


def weight_sizes(shape: ModelShape, request: PlanRequest, group_size: int, symmetric: bool) -> WeightSizes:
    """Sizes of `shape` with candidates of at most `group_size`; raises InputError where the ranks do not divide it."""
    stages = tuple(stage_layers(shape.blocks, request.pipeline_parallel_size))
    fixed = list(_others(shape, request.ranks, stages))
    by_width = [dict.fromkeys(WIDTHS, 0) for _ in stages]
    quantizable = [0] * len(stages)
    for kind in shape.modules:
        usable = None if kind.why_16 else usable_group_size(kind.shape[1], group_size)
        counts = _counts(kind, stages)
        at_16 = _one(kind, ModuleFormat(shape=kind.shape, num_bits=16), request, shape.heads) * (kind.experts or 1)
        for stage, count in enumerate(counts):
            if usable is None:
                fixed[stage] += count * _on_rank(kind, at_16, request.ranks)
                continue
            quantizable[stage] += count * _on_rank(kind, at_16, request.ranks) // 2
            for bits in WIDTHS:
                form = _format(kind.shape, bits, usable, symmetric)
                nbytes = _one(kind, form, request, shape.heads) * (kind.experts or 1)
                by_width[stage][bits] += count * _on_rank(kind, nbytes, request.ranks)
    return WeightSizes(shape, request, stages, tuple(by_width), tuple(fixed), tuple(quantizable))


def _format(shape: tuple[int, int], bits: int, group_size: int, symmetric: bool) -> ModuleFormat:
    if bits == 16:
        return ModuleFormat(shape=shape, num_bits=16)
    return ModuleFormat.model_validate(
        {"shape": shape, "num_bits": bits, "group_size": group_size, "symmetric": symmetric}
    )


def _one(kind: ModuleKind, form: ModuleFormat, request: PlanRequest, heads: Heads) -> int:
    try:
        return resident_bytes(form, kind.split, request.ranks, heads, request.kernel)
    except InputError as error:
        raise InputError(f"{kind.name}: {error}") from None


def _on_rank(kind: ModuleKind, nbytes: int, ranks: Ranks) -> int:
    """With expert parallelism whole experts are divided among the ranks; `nbytes` are of all experts."""
    if not kind.experts or not ranks.expert_parallel:
        return nbytes
    held = -(-kind.experts // ranks.tensor_parallel_size)
    return nbytes // kind.experts * held


def _counts(kind: ModuleKind, stages: tuple[range, ...]) -> list[int]:
    if kind.blocks:
        return [sum(1 for b in kind.blocks if b in stage) for stage in stages]
    here = _stages_of(kind, None, stages)
    return [int(i in here) for i in range(len(stages))]


def _stages_of(kind: ModuleKind, block: int | None, stages: tuple[range, ...]) -> set[int]:
    """Stages that hold the modules: a block's own; the embedding the first, and the last too if it is the head."""
    if block is not None:
        return {i for i, stage in enumerate(stages) if block in stage}
    return {0} if kind.role == "embedding" else {len(stages) - 1}


def _others(shape: ModelShape, ranks: Ranks, stages: tuple[range, ...]) -> list[int]:
    totals = [0] * len(stages)
    for other in shape.others:
        nbytes = 2 * _elements(other, ranks, shape.heads)
        if "{i}" in other.name:
            for i, stage in enumerate(stages):
                totals[i] += nbytes * sum(1 for b in other.numbers if b in stage)
        else:
            last = re.search(r"(^|\.)norm\.", other.name) is not None
            totals[-1 if last else 0] += nbytes * other.count
    if shape.tied and len(stages) > 1:
        embedding = next(kind for kind in shape.modules if kind.role == "embedding")
        totals[-1] += 2 * pad(embedding.shape[0], 64) * embedding.shape[1] // ranks.tensor_parallel_size
    return totals


def _elements(other: OtherKind, ranks: Ranks, heads: Heads) -> int:
    """Elements of one such tensor on one rank."""
    size = ranks.tensor_parallel_size
    split: Split = other.split
    if split == "kv":
        rows = other.shape[0] // heads.key_value
        return rows * max(heads.key_value // size, 1)
    if split in ("column", "row"):
        return prod(other.shape) // size
    return prod(other.shape)
