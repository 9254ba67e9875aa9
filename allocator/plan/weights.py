"""Bytes of a model's weights on the tightest rank: at one width throughout, and of a checkpoint's formats."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from pydantic import Field

from allocator.contract.checkpoint import CheckpointConfig
from allocator.contract.documents import Strict
from allocator.contract.errors import InputError
from allocator.contract.layout import WIDTHS, ModuleFormat, usable_group_size
from allocator.contract.modules import kind_name, original_shapes
from allocator.contract.resident import VOCABULARY_PADDING, Heads, Ranks, Residency, Split, Stage, pad
from allocator.model.hf_config import find_config
from allocator.model.quantized_source import split_quantization
from allocator.model.shape import ModelShape, ModuleKind, OtherKind, read_shape
from allocator.plan.kv_cache import stage_layers
from allocator.plan.schema import PlanRequest

__all__ = [
    "PlannedModel",
    "WarmupSegment",
    "WeightSizes",
    "check_formats",
    "distinct_segments",
    "module_shapes",
    "read_model",
    "residency_of",
    "sample_of",
    "weight_sizes",
]


@dataclass(frozen=True)
class WeightSizes:
    """Sizes by stage: `by_width[stage][b]` of the quantizable modules at `b` bits, `fixed[stage]` of all else.

    `quantizable[stage]` are weights of the quantizable modules on a rank.
    """

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
        stages = [s for s in zip(self.fixed, self.by_width, self.quantizable, strict=True) if s[2]]
        bits = [8 * min(budget_bytes - fixed, sizes[16]) / weights for fixed, sizes, weights in stages]
        return min(bits) if bits else None


def residency_of(shape: ModelShape, request: PlanRequest) -> Residency:
    """How the modules of `shape` lie on the ranks of `request`. Raises InputError if config.json tells too little."""
    if unsized := [part for part in shape.beside if not any(other.name.startswith(part) for other in shape.others)]:
        raise InputError(
            f"{shape.architecture}: what stands beside its language model ({', '.join(unsized)}) is not planned yet; "
            "learn, and solve for a budget in bytes or bits (--budget, --average-bits)"
        )
    heads = [layer.kv_heads for layer in shape.attention if layer.kind in ("full", "sliding", "chunked")]
    fewest = min(heads, default=shape.heads.key_value)
    groups = max((layer.state.groups for layer in shape.attention if layer.state is not None), default=0)
    if groups % request.tensor_parallel_size:
        raise InputError(
            f"--tensor-parallel-size {request.tensor_parallel_size} does not divide the {groups} groups of the Mamba "
            f"layers of {shape.architecture}, of which vLLM would hold some more than once; that is not planned"
        )
    if fewest < min(request.tensor_parallel_size, shape.heads.key_value):
        raise InputError(
            f"--tensor-parallel-size {request.tensor_parallel_size}: layers of {shape.architecture} have {fewest} key "
            f"and value heads, others {shape.heads.key_value}; at most {fewest} ranks are planned"
        )
    stages = stage_layers(shape.blocks, request.pipeline_parallel_size)
    others = _others(shape, request.ranks, stages)
    return Residency(
        kernel=request.kernel,
        tensor_parallel_size=request.tensor_parallel_size,
        expert_parallel=request.expert_parallel,
        heads=shape.heads,
        experts=0 if shape.experts is None else shape.experts.count,
        stages=[
            Stage(first_block=stage.start, last_block=stage.stop - 1, other_bytes=nbytes)
            for stage, nbytes in zip(stages, others, strict=True)
        ],
        splits=_splits(shape),
        fused={kind_name(sample_of(kind)): kind.fused.rpartition(".")[2] for kind in shape.modules if kind.fused},
    )


def _splits(shape: ModelShape) -> dict[str, Split]:
    """By the name of a kind; of modules that are cut otherwise than their like in other blocks, by their own name."""
    splits: dict[str, Split] = {}
    for kind in shape.modules:
        if splits.setdefault(kind_name(sample_of(kind)), kind.split) != kind.split:
            splits |= {_numbered(kind, block, 0): kind.split for block in kind.blocks}
    return splits


def weight_sizes(shape: ModelShape, residency: Residency, group_size: int, symmetric: bool) -> WeightSizes:
    """Sizes of `shape` with candidates of at most `group_size`; raises InputError where the ranks do not divide it."""
    stages = residency.stages
    fixed = [stage.other_bytes for stage in stages]
    by_width = [dict.fromkeys(WIDTHS, 0) for _ in stages]
    quantizable = [0] * len(stages)
    for kind in shape.modules:
        usable = None if kind.why_16 else usable_group_size(kind.shape[1], group_size)
        forms = {bits: _format(kind.shape, bits, usable, symmetric) for bits in (WIDTHS if usable else (16,))}
        sizes = {bits: residency.module_bytes(sample_of(kind), form) for bits, form in forms.items()}
        for stage, count in _counts(kind, residency).items():
            if usable is None:
                fixed[stage] += count * sizes[16]
                continue
            quantizable[stage] += count * sizes[16] // 2
            for bits in WIDTHS:
                by_width[stage][bits] += count * sizes[bits]
    return WeightSizes(tuple(by_width), tuple(fixed), tuple(quantizable))


def check_formats(shape: ModelShape, formats: Mapping[str, ModuleFormat]) -> None:
    """Raises InputError when a checkpoint's modules are not those of the model."""
    expected = module_shapes(shape)
    found = original_shapes({name: form.shape for name, form in formats.items()})
    if odd := sorted(expected.keys() ^ found.keys()):
        where = "config.json has no such module" if odd[0] in found else "the checkpoint has no entry"
        raise InputError(f"{odd[0]}: {where}; it belongs to another model")
    for name, stored in found.items():
        if stored != expected[name]:
            raise InputError(f"{name}: shape {list(stored)} in the checkpoint, {list(expected[name])} in config.json")


def module_shapes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """The shape of every module, by its name."""
    return {
        _numbered(kind, block, expert): kind.shape
        for kind in shape.modules
        for block in kind.blocks or (0,)
        for expert in range(kind.experts or 1)
    }


def _numbered(kind: ModuleKind, block: int, expert: int) -> str:
    return kind.name.replace("{i}", str(block)).replace("{e}", str(expert))


def sample_of(kind: ModuleKind) -> str:
    """The name of the first module of `kind`."""
    return _numbered(kind, kind.blocks[0] if kind.blocks else 0, 0)


def _format(shape: tuple[int, int], bits: int, group_size: int | None, symmetric: bool) -> ModuleFormat:
    if bits == 16:
        return ModuleFormat(shape=shape, num_bits=16)
    return ModuleFormat.model_validate(
        {"shape": shape, "num_bits": bits, "group_size": group_size, "symmetric": symmetric}
    )


def _counts(kind: ModuleKind, residency: Residency) -> dict[int, int]:
    """Stage -> how many modules of the kind it holds, all experts counted."""
    if not kind.blocks:
        return dict.fromkeys(residency.stages_of(kind.name), 1)
    counts = {}
    for i, stage in enumerate(residency.stages):
        here = sum(stage.first_block <= block <= stage.last_block for block in kind.blocks)
        counts[i] = here * (kind.experts or 1)
    return counts


def _others(shape: ModelShape, ranks: Ranks, stages: list[range]) -> list[int]:
    """Bytes of what is copied on a rank of each stage, at 16 bits unless vLLM widens it: blocks' own, and the rest
    before or after them."""
    totals = [0] * len(stages)
    for other in shape.others:
        nbytes = (4 if other.float32 else 2) * _elements(other, ranks, shape.heads)
        if "{i}" in other.name:
            for i, stage in enumerate(stages):
                totals[i] += nbytes * sum(1 for block in other.numbers if block in stage)
        else:
            totals[-1 if other.name.endswith("model.norm.weight") else 0] += nbytes * other.count
    for kind in shape.modules if any(layer.kind == "mla" for layer in shape.attention) else ():
        if kind.name.endswith("kv_b_proj"):  # of which vLLM keeps a copy at 16 bits, for decoding in the latent space
            for i, stage in enumerate(stages):
                here = sum(1 for block in kind.blocks if block in stage)
                totals[i] += here * 2 * prod(kind.shape) // ranks.tensor_parallel_size
    return totals


def _elements(other: OtherKind, ranks: Ranks, heads: Heads) -> int:
    """Elements of one such tensor on one rank."""
    size = ranks.tensor_parallel_size
    split: Split = other.split
    if split == "kv":
        return other.shape[0] // heads.key_value * max(heads.key_value // size, 1)
    if split.startswith("expert") and ranks.expert_parallel:  # biases `[experts, rows]`
        return prod(other.shape) // other.shape[0] * -(-other.shape[0] // size)
    if other.name.endswith(_OF_TOKENS):
        return pad(other.shape[0], VOCABULARY_PADDING) // size * prod(other.shape[1:])
    if split in ("column", "row", "expert_column") or other.name.endswith(_DIVIDED):
        return prod(other.shape) // size
    return prod(other.shape)


_OF_TOKENS = ".embed_tokens_per_layer.weight"
"""What Gemma 4 gives each block of each token: a second embedding."""
_DIVIDED = (
    ".sinks", ".attention_sink_bias", ".A_log", ".D", ".dt_bias", ".conv1d.weight", ".conv1d.bias", ".conv.weight",
    ".conv.bias", ".mixer.norm.weight", ".mamba.norm.weight",
)  # fmt: skip
"""Ends of the names of tensors of heads and channels that are no part of a linear layer, and that ranks divide."""


@dataclass(frozen=True)
class PlannedModel:
    """A model at 16 bits, or a `checkpoint` of ours."""

    name: str
    shape: ModelShape
    checkpoint: CheckpointConfig | None

    @property
    def formats(self) -> dict[str, ModuleFormat] | None:
        """Those of the checkpoint."""
        return None if self.checkpoint is None else self.checkpoint.modules

    def check_ranks(self, tensor_parallel_size: int) -> None:
        """Raises InputError for a checkpoint that vLLM cannot split so."""
        if self.checkpoint is not None:
            self.checkpoint.parents.check_ranks(tensor_parallel_size)


def read_model(model: str, revision: str | None = None) -> PlannedModel:
    """From config.json alone: of a folder, a file, or a hub id. A model that is quantized already is planned as what it
    is dequantized to. Raises InputError, also where it cannot be."""
    config = dict(find_config(model, revision))
    quantized = config.get("quantization_config")
    checkpoint = None
    if isinstance(quantized, dict) and quantized.get("quant_method") == CheckpointConfig.QUANT_METHOD:
        checkpoint = CheckpointConfig.parse(config.pop("quantization_config"))
    config = split_quantization(config, model)[0]
    name = model.rstrip("/") if not Path(model).exists() else Path(model).resolve().name
    return PlannedModel(name, read_shape(config), checkpoint)


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
