"""Bytes that one rank of vLLM holds after loading: a closed formula of how a module is stored, split and packed.

`split` names how tensor parallelism cuts a module (Megatron's scheme, as vLLM's linear layers have it):

    column      rows (out_features) are divided among the ranks
    kv          rows of key or value heads: divided, and replicated when there are more ranks than heads
    qkv         a whole `qkv_proj` stored as one: query rows as column, key and value rows as kv
    row         columns (in_features) are divided
    replicated  every rank holds all
    vocabulary  rows are padded to a multiple of 64 and divided (`vocab_parallel_embedding.py`)
    expert_column, expert_row   one expert of a mixture: as column and row, or with expert parallelism whole
                experts are divided among the ranks

All ranks of one pipeline stage hold the same number of bytes.
"""

from dataclasses import dataclass
from typing import Literal

from allocator.contract.errors import InputError
from allocator.contract.layout import PACK_UNIT, ModuleFormat

__all__ = [
    "VOCABULARY_PADDING",
    "Heads",
    "Kernel",
    "Ranks",
    "Split",
    "pad",
    "rank_shape",
    "resident_bytes",
]

Split = Literal["column", "kv", "qkv", "row", "replicated", "vocabulary", "expert_column", "expert_row"]
Kernel = Literal["torch", "ark", "humming"]

VOCABULARY_PADDING = 64
"""`DEFAULT_VOCAB_PADDING_SIZE` of vLLM."""


@dataclass(frozen=True)
class Heads:
    """Attention heads of the model, which `kv` and `qkv` are divided by."""

    query: int
    key_value: int
    size: int


@dataclass(frozen=True)
class Ranks:
    """How vLLM is started: `--tensor-parallel-size`, `--enable-expert-parallel`."""

    tensor_parallel_size: int = 1
    expert_parallel: bool = False


def pad(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def _divided(what: str, value: int, ranks: Ranks) -> int:
    size = ranks.tensor_parallel_size
    if value % size:
        fitting = [n for n in range(1, 65) if value % n == 0]
        raise InputError(f"tensor_parallel_size {size} does not divide {what} {value}; possible are {fitting}")
    return value // size


def rank_shape(
    shape: tuple[int, int], split: Split, ranks: Ranks, heads: Heads | None = None, group_size: int | None = None
) -> tuple[int, int]:
    """Rows and columns that one rank holds of a module `[out_features, in_features]`.

    Raises InputError when vLLM could not cut it: a size that the ranks do not divide, or a group of
    `group_size` weights (or a packed word) that would be cut through.
    """
    rows, columns = shape
    match split:
        case "replicated":
            return shape
        case "vocabulary":
            return _divided("the padded vocabulary", pad(rows, VOCABULARY_PADDING), ranks), columns
        case "kv" | "qkv":
            if heads is None:
                raise InputError("key and value heads are needed to divide qkv_proj among ranks")
            return _kv_rows(rows, split, ranks, heads), columns
        case "expert_column" | "expert_row" if ranks.expert_parallel:
            return shape
        case "row" | "expert_row":
            part = _divided("in_features", columns, ranks)
            if group_size is not None and (part % group_size or part % PACK_UNIT):
                raise InputError(
                    f"tensor_parallel_size {ranks.tensor_parallel_size} gives each rank {part} of {columns} "
                    f"in_features, no multiple of group_size {group_size}; use a smaller group size or fewer ranks"
                )
            return rows, part
        case _:
            return _divided("out_features", rows, ranks), columns


def _kv_rows(rows: int, split: Split, ranks: Ranks, heads: Heads) -> int:
    size = ranks.tensor_parallel_size
    if size <= heads.key_value:
        kept = _divided("key and value heads", heads.key_value, ranks)
    elif size % heads.key_value:
        raise InputError(
            f"tensor_parallel_size {size} is no multiple of the {heads.key_value} key and value heads, "
            "which it exceeds; vLLM cannot replicate them"
        )
    else:
        kept = 1
    if split == "qkv":
        return (_divided("attention heads", heads.query, ranks) + 2 * kept) * heads.size
    return rows // heads.key_value * kept


def resident_bytes(
    module: ModuleFormat,
    split: Split,
    ranks: Ranks | None = None,
    heads: Heads | None = None,
    kernel: Kernel = "torch",
) -> int:
    """Bytes of one module on one rank; `weight_shape` is not kept.

    The torch kernel keeps the tensors of the file: packed rows, 16-bit scales, packed zero points. Neighbouring
    modules of one kind inside a fused layer join their zero points, which can save a word where their rows
    do not fill whole words; this counts each for itself and never too little.
    """
    ranks = ranks or Ranks()
    rows, columns = rank_shape(module.shape, split, ranks, heads, module.group_size)
    if not module.quantized:
        return 2 * rows * columns
    assert module.group_size is not None
    if kernel == "humming":
        rows, columns = pad(rows, 256), pad(columns, 128)
    groups = columns // module.group_size
    packed = rows * columns * module.num_bits // 8
    if kernel == "ark":
        raise InputError("resident bytes of the ark kernel are not known yet")
    zero_points = 0 if module.symmetric else 4 * -(-rows * module.num_bits // 32) * groups
    return packed + 2 * rows * groups + zero_points
