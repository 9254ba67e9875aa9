"""The shard table: which rows and columns of which checkpoint module make up one vLLM layer on one rank.

A vLLM layer is one or several shards (q/k/v, gate/up), each with its own width, group size and symmetry. All
arithmetic of shapes, tensor parallelism and merging is here and needs neither torch nor vllm.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from allocator.contract.errors import ContractError
from allocator.contract.layout import PACK_UNIT, ModuleFormat

__all__ = [
    "PARTS",
    "CheckpointModule",
    "LayerGeometry",
    "Segment",
    "Shard",
    "Window",
    "merge",
    "plan_shards",
    "plan_vocabulary",
    "windows",
]

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight")
"""The tensors that a checkpoint module can have, by the last component of their names."""


@dataclass(frozen=True)
class CheckpointModule:
    """A module of the checkpoint: its name there (vLLM may know it by another) and how it is stored."""

    name: str
    format: ModuleFormat


@dataclass(frozen=True)
class LayerGeometry:
    """What vLLM says of a layer on this rank: sizes of the whole layer, and of the rank's partition.

    `copies[i]` is how many neighbouring ranks hold the same rows of shard i: KV heads are replicated when
    there are more ranks than heads.
    """

    prefix: str
    input_size: int
    output_size: int
    input_size_per_partition: int
    output_partition_sizes: tuple[int, ...]
    tp_rank: int
    tp_size: int
    copies: tuple[int, ...]

    @property
    def splits_columns(self) -> bool:
        return self.input_size_per_partition != self.input_size

    @property
    def splits_rows(self) -> bool:
        return sum(self.output_partition_sizes) != self.output_size

    def module_rows(self, shard: int) -> int:
        """Rows of shard `shard` in the checkpoint."""
        ranks = self.tp_size // self.copies[shard] if self.splits_rows else 1
        return self.output_partition_sizes[shard] * ranks


@dataclass(frozen=True)
class Shard:
    """Rows and columns of one checkpoint module that one rank holds."""

    module: CheckpointModule
    row_start: int
    rows: int
    column_start: int
    columns: int

    @property
    def quantized(self) -> bool:
        return self.module.format.quantized

    @property
    def num_bits(self) -> int:
        return self.module.format.num_bits

    @property
    def kind(self) -> tuple[int, int | None, bool | None]:
        """(width, group size, symmetric): shards of one kind can share a GEMM."""
        return self.num_bits, self.module.format.group_size, self.module.format.symmetric

    def shape(self, part: str) -> tuple[int, ...] | None:
        """Shape that tensor `part` of this shard has on this rank; None when the shard has no such tensor."""
        module_format = self.module.format
        if not self.quantized:
            return (self.rows, self.columns) if part == "weight" else None
        groups = self.columns // (module_format.group_size or 1)
        match part:
            case "weight_packed":
                return self.rows, self.columns * self.num_bits // 32
            case "weight_scale":
                return self.rows, groups
            case "weight_zero_point" if not module_format.symmetric:
                return -(-self.rows * self.num_bits // 32), groups
        return None


@dataclass(frozen=True)
class Window:
    """Where tensor `part` of one shard lies in the layer's flat parameter."""

    shard: Shard
    offset: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Segment:
    """Neighbouring shards of one kind, multiplied by one GEMM. `shards` are their indices in the layer."""

    shards: tuple[int, ...]
    num_bits: int
    group_size: int | None
    symmetric: bool | None
    rows: int
    columns: int

    @property
    def quantized(self) -> bool:
        return self.num_bits != 16


def plan_shards(modules: Sequence[CheckpointModule], geometry: LayerGeometry) -> list[Shard]:
    """The shard table of a layer made of checkpoint `modules`, in vLLM's order of output rows.

    Usually there is one module a shard. With fewer modules than shards a module covers several neighbouring ones
    (a `qkv_proj` that the checkpoint stores as one).

    Raises ContractError when a module's shape is not what the layer needs, or when tensor parallelism would
    cut through a group or a packed word.
    """
    count = len(geometry.output_partition_sizes)
    one_each = len(modules) == count
    shards: list[Shard] = []
    for module in modules:
        rows, columns = module.format.shape
        if columns != geometry.input_size:
            raise ContractError(
                f"{module.name}: quantization_config says shape {[rows, columns]}, "
                f"the layer {geometry.prefix} has in_features {geometry.input_size}"
            )
        covered = 0
        while len(shards) < count and (covered == 0 if one_each else covered < rows):
            shards.append(_shard(module, covered, len(shards), geometry))
            covered += geometry.module_rows(len(shards) - 1)
        if covered != rows:
            raise ContractError(
                f"{module.name}: quantization_config says shape {[rows, columns]}, "
                f"the layer {geometry.prefix} has {covered} output rows for it"
            )
    if len(shards) != count:
        raise ContractError(
            f"layer {geometry.prefix}: {', '.join(m.name for m in modules)} have {len(shards)} of its "
            f"{count} shards; the checkpoint is for another architecture"
        )
    return shards


def plan_vocabulary(module: CheckpointModule, vocabulary: int, hidden_size: int, row_start: int, rows: int) -> Shard:
    """The rows of an embedding or lm_head `[vocabulary, hidden_size]` on one rank.

    vLLM pads the vocabulary, so `row_start + rows` may lie past the last row: what is not in the checkpoint is
    filled with zeros. Raises ContractError when the module has another shape.
    """
    if module.format.shape != (vocabulary, hidden_size):
        raise ContractError(
            f"{module.name}: quantization_config says shape {list(module.format.shape)}, "
            f"the model has a vocabulary of {vocabulary} and hidden size {hidden_size}"
        )
    return Shard(module, min(row_start, vocabulary), rows, 0, hidden_size)


def _shard(module: CheckpointModule, offset: int, index: int, geometry: LayerGeometry) -> Shard:
    rows = geometry.output_partition_sizes[index]
    row_start = offset
    if geometry.splits_rows:
        row_start += geometry.tp_rank // geometry.copies[index] * rows
    columns = geometry.input_size_per_partition
    group_size = module.format.group_size
    if group_size is not None and (columns % group_size or columns % PACK_UNIT):
        raise ContractError(
            f"{module.name}: tensor_parallel_size {geometry.tp_size} gives each rank {columns} of "
            f"{geometry.input_size} in_features, no multiple of group_size {group_size}; "
            f"possible are {_possible_tp(geometry.input_size, group_size)}"
        )
    column_start = geometry.tp_rank * columns if geometry.splits_columns else 0
    return Shard(module, row_start, rows, column_start, columns)


def _possible_tp(columns: int, group_size: int) -> list[int]:
    return [n for n in range(1, 65) if columns % n == 0 and columns // n % group_size == 0]


def windows(shards: Iterable[Shard], part: str) -> dict[int, Window]:
    """Shard index -> window, for the shards that have tensor `part`, laid out one after the other.

    `weight_shape` belongs to a module, not to a shard: it stands with the module's first shard, and again where the
    same rows are loaded again (keys that are values too).
    """
    table: dict[int, Window] = {}
    offset, first_rows = 0, dict[str, int]()
    for index, shard in enumerate(shards):
        shape = shard.shape(part)
        if part == "weight_shape" and shard.quantized:
            begins = first_rows.setdefault(shard.module.name, shard.row_start) == shard.row_start
            shape = (2,) if begins else None
        if shape is not None:
            table[index] = Window(shard, offset, shape)
            offset += math.prod(shape)
    return table


def merge(shards: Sequence[Shard]) -> list[Segment]:
    """Join neighbouring shards of one kind, so that equal widths cost one GEMM and not three."""
    segments: list[Segment] = []
    for index, shard in enumerate(shards):
        indices: tuple[int, ...] = (index,)
        rows = shard.rows
        if segments and shards[segments[-1].shards[0]].kind == shard.kind:
            last = segments.pop()
            indices, rows = (*last.shards, index), last.rows + shard.rows
        segments.append(Segment(indices, *shard.kind, rows, shard.columns))
    return segments
