"""Bytes that one rank of vLLM holds after loading: a closed formula of how a module is stored, split and packed.

`split` names how tensor parallelism cuts a module (Megatron's scheme, as vLLM's layers have it):

    column      rows (out_features) are divided among the ranks
    kv          rows of key or value heads: divided, and replicated when there are more ranks than heads
    key_value   rows of keys that are the values too (Gemma 4): as kv, and held twice
    qkv         a whole `qkv_proj` stored as one: query rows as column, key and value rows as kv
    row         columns (in_features) are divided
    replicated  every rank holds all
    embedding, head, tied   rows of the vocabulary, padded to a multiple of 64 and divided; a tied module is both
    expert_column, expert_row   one expert of a mixture: as column and row; with expert parallelism whole
                experts are divided among the ranks

Modules that vLLM fuses into one layer and whose width, group size and symmetry are equal are packed together, if they
are neighbours. All ranks of one pipeline stage hold the same number of bytes.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from pydantic import Field

from allocator.contract.documents import Strict
from allocator.contract.errors import InputError
from allocator.contract.layout import GROUP_SIZES, PACK_UNIT, ModuleFormat
from allocator.contract.modules import kind_name, layer_name, parent_of

__all__ = [
    "ARK_ROWS",
    "EXPERT_ALIGNMENT_BYTES",
    "HUMMING_COLUMNS",
    "HUMMING_ROWS",
    "VOCABULARY_PADDING",
    "Heads",
    "Kernel",
    "Ranks",
    "Residency",
    "Split",
    "Stage",
    "pad",
    "rank_shape",
    "resident_bytes",
    "segment_bytes",
    "segment_tensors",
]

Split = Literal[
    "column", "kv", "key_value", "qkv", "row", "replicated", "embedding", "head", "tied", "expert_column", "expert_row"
]
Kernel = Literal["torch", "native", "ark", "ark-amx", "humming"]
"""`ark-amx` is ark on a CPU with AMX."""

VOCABULARY_PADDING = 64
"""`DEFAULT_VOCAB_PADDING_SIZE` of vLLM."""

Result = TypeVar("Result")

ARK_ROWS = {"ark": 24, "ark-amx": 48}
"""To what ARK pads rows, multiplying in float32, its default."""
_ARK_HEADER_BYTES = 128
HUMMING_ROWS, HUMMING_COLUMNS = 256, 128
"""To what vLLM pads the layers that it gives to humming; its tuned configurations are for these."""
EXPERT_ALIGNMENT_BYTES = 64
"""Of each tensor of an expert: those of one name lie in one tensor."""
_MOST_RANKS = 64
"""Where the heads are not known, more are not named in errors."""


class Heads(Strict):
    """Attention heads of the model, which `kv` and `qkv` are divided by."""

    query: int = Field(ge=1)
    key_value: int = Field(ge=1)
    size: int = Field(ge=1)

    def rank_counts(self) -> list[int]:
        """The numbers of ranks that vLLM can divide the heads among, replicating those of keys and values."""
        kv = self.key_value
        return [n for n in range(1, self.query + 1) if self.query % n == 0 and (kv % n == 0 or n % kv == 0)]


@dataclass(frozen=True)
class Ranks:
    """How vLLM is started: `--tensor-parallel-size`, `--enable-expert-parallel`."""

    tensor_parallel_size: int = 1
    expert_parallel: bool = False


def pad(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


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
        case "embedding" | "head" | "tied":
            return _divided("the padded vocabulary", pad(rows, VOCABULARY_PADDING), split, ranks, heads), columns
        case "kv" | "key_value" | "qkv":
            if heads is None:
                raise InputError("key and value heads are needed to divide qkv_proj among ranks")
            return _kv_rows(rows, split, ranks, heads), columns
        case "expert_column" | "expert_row" if ranks.expert_parallel:
            return shape
        case "row" | "expert_row":
            part = _divided("in_features", columns, split, ranks, heads)
            if group_size is not None and (part % group_size or part % PACK_UNIT):
                fitting = [n for n in _rank_counts(heads) if columns % (n * group_size) == 0]
                smaller = [g for g in GROUP_SIZES if g < group_size and part % g == 0]
                ways = [f"group_size {max(smaller)}"] if smaller else []
                ways += [f"tensor_parallel_size {_either(fitting)}"]
                raise InputError(
                    f"tensor_parallel_size {ranks.tensor_parallel_size} gives each rank {part} of {columns} "
                    f"in_features, no multiple of group_size {group_size}{'' if smaller else ' or of a smaller one'}; "
                    f"use {' or '.join(ways)}{_expert_parallelism(split)}"
                )
            return rows, part
        case _:
            return _divided("out_features", rows, split, ranks, heads), columns


def _divided(what: str, value: int, split: Split, ranks: Ranks, heads: Heads | None) -> int:
    size = ranks.tensor_parallel_size
    if value % size:
        fitting = [n for n in _rank_counts(heads) if value % n == 0]
        raise InputError(
            f"tensor_parallel_size {size} does not divide {what} {value}; "
            f"possible are {_either(fitting)}{_expert_parallelism(split)}"
        )
    return value // size


def _rank_counts(heads: Heads | None) -> list[int]:
    return list(range(1, _MOST_RANKS + 1)) if heads is None else heads.rank_counts()


def _either(numbers: list[int]) -> str:
    return " or ".join([", ".join(map(str, numbers[:-1])), str(numbers[-1])] if numbers[1:] else map(str, numbers))


def _expert_parallelism(split: Split) -> str:
    return ", or --enable-expert-parallel, which leaves experts whole" if split.startswith("expert") else ""


def _kv_rows(rows: int, split: Split, ranks: Ranks, heads: Heads) -> int:
    size = ranks.tensor_parallel_size
    if heads.key_value % size and size % heads.key_value:
        what = "does not divide" if size < heads.key_value else "is no multiple of"
        raise InputError(
            f"tensor_parallel_size {size} {what} the {heads.key_value} key and value heads, which vLLM would have to "
            f"cut; possible are {_either(_rank_counts(heads))}"
        )
    kept = max(heads.key_value // size, 1)
    if split == "qkv":
        return (_divided("attention heads", heads.query, split, ranks, heads) + 2 * kept) * heads.size
    return rows // heads.key_value * kept * (2 if split == "key_value" else 1)


def segment_tensors(rows: int, columns: int, module: ModuleFormat, kernel: Kernel) -> tuple[int, ...]:
    """Bytes of each tensor that holds `rows` packed together; `module` says their storage (its shape does not count).

    torch keeps the tensors of the file but `weight_shape`: packed rows, 16-bit scales, packed zero points. native keeps
    the same, with zero points of one byte. ark has one blob: rows padded to `ARK_ROWS`, codes, float32 scales, zero
    points of one byte, and 128 bytes; found by packing thousands of shapes with auto-round-lib 0.16.0, for its default,
    fp32 (with AMX the other compute types take more). humming pads rows to 256 and columns to 128, and unpacks zero
    points to 4 bits up to 4-bit codes, else 8 (its `transform.py`); the locks of its scheduler, 32 bytes for each
    multiprocessor of the GPU, are not counted. Tests compare each with the tensors that the kernels really make.
    """
    if not module.quantized:
        return (2 * rows * columns,)
    assert module.group_size is not None
    bits = module.num_bits
    if kernel in ARK_ROWS:
        groups = columns // module.group_size
        each = columns * bits // 8 + groups * (4 if module.symmetric else 5)
        return (pad(rows, ARK_ROWS[kernel]) * each + _ARK_HEADER_BYTES,)
    zero_point_bits = bits
    if kernel == "humming":
        rows, columns = pad(rows, HUMMING_ROWS), pad(columns, HUMMING_COLUMNS)
        zero_point_bits = 4 if bits <= 4 else 8
    groups = columns // module.group_size
    packed, scales = rows * columns * bits // 8, 2 * rows * groups
    if module.symmetric:
        return packed, scales
    if kernel == "native":
        return packed, scales, rows * groups
    return packed, scales, 4 * -(-rows * zero_point_bits // 32) * groups


def segment_bytes(rows: int, columns: int, module: ModuleFormat, kernel: Kernel, alignment: int = 1) -> int:
    """Sum of `segment_tensors`, each padded to `alignment`."""
    return sum(pad(nbytes, alignment) for nbytes in segment_tensors(rows, columns, module, kernel))


def resident_bytes(
    module: ModuleFormat,
    split: Split,
    ranks: Ranks | None = None,
    heads: Heads | None = None,
    kernel: Kernel = "torch",
) -> int:
    """Bytes of one module on one rank (of one expert, on a rank that holds it), packed for itself.

    What it takes beside others is never more: packing neighbours together saves padding.
    """
    rows, columns = rank_shape(module.shape, split, ranks or Ranks(), heads, module.group_size)
    alignment = EXPERT_ALIGNMENT_BYTES if split.startswith("expert") else 1
    nbytes = segment_bytes(rows, columns, module, kernel, alignment)
    if not module.quantized or split not in ("embedding", "tied"):
        return nbytes
    # An embedding gathers rows, which it keeps as the torch kernel does.
    gathered = segment_bytes(rows, columns, module, "torch")
    if split == "embedding" or kernel == "torch":
        return gathered
    if kernel == "native":  # which multiplies with the same codes and scales, and has zero points of its own
        return gathered + sum(segment_tensors(rows, columns, module, "native")[2:])
    return gathered + nbytes


class Stage(Strict):
    """The blocks `first_block` to `last_block` of one pipeline stage, and its bytes that are no modules (norms,
    biases, whatever is copied)."""

    first_block: int = Field(ge=0)
    last_block: int = Field(ge=0)
    other_bytes: int = Field(ge=0)


class Residency(Strict):
    """How the modules of a model lie on the ranks. `splits` and `fused` are by kind of name (`kind_name`), `splits` too
    by the name of a module that is cut otherwise than its kind. `fused` has the order of vLLM's layers (q, k, v)."""

    kernel: Kernel
    tensor_parallel_size: int = Field(ge=1)
    expert_parallel: bool
    heads: Heads
    experts: int = Field(default=0, ge=0)
    stages: list[Stage] = Field(min_length=1)
    splits: dict[str, Split]
    fused: dict[str, str]

    @property
    def ranks(self) -> Ranks:
        return Ranks(self.tensor_parallel_size, self.expert_parallel)

    def stages_of(self, name: str) -> list[int]:
        """The stages that hold module `name`: its block's; the first for an embedding, the last for a head."""
        match = _NUMBER.search(name)
        if match is not None:
            block = int(match[1])
            return [i for i, s in enumerate(self.stages) if s.first_block <= block <= s.last_block]
        split = self._split(name)
        last = len(self.stages) - 1
        return {"embedding": [0], "tied": sorted({0, last})}.get(split, [last])

    def module_bytes(self, name: str, module: ModuleFormat) -> int:
        """Bytes of a module on the rank that holds it, packed for itself. Raises InputError for an unknown name.

        With expert parallelism an expert counts for the ranks' even share of it.
        """
        split = self._split(name)
        nbytes = self._checked(name, lambda: resident_bytes(module, split, self.ranks, self.heads, self.kernel))
        if split.startswith("expert") and self.expert_parallel:
            held = -(-self.experts // self.tensor_parallel_size)
            nbytes = -(-nbytes * held // self.experts)
        return nbytes

    def segments(self, modules: Mapping[str, ModuleFormat]) -> Iterable[tuple[ModuleFormat, int, int]]:
        """What the kernels multiply with on a rank, layer by layer: storage, rows and columns; neighbours of one kind
        are one. Raises InputError where the ranks do not divide a module."""
        for names in self._layers(modules):
            yield from self._segments(names, modules)

    def stage_bytes(self, modules: Mapping[str, ModuleFormat]) -> list[int]:
        """Bytes of a whole model on the tightest rank of each stage, fused layers packed as vLLM's plugin does."""
        ranks = self.tensor_parallel_size if self.expert_parallel else 1
        totals = [[stage.other_bytes] * ranks for stage in self.stages]
        for names in self._layers(modules):
            nbytes = self._layer_bytes(names, modules)
            for stage in self.stages_of(names[0]):
                for rank in self._ranks_of(names[0], ranks):
                    totals[stage][rank] += nbytes
        return [max(ranks) for ranks in totals]

    def _ranks_of(self, name: str, ranks: int) -> Iterable[int]:
        """Experts are dealt out in order; the first ranks take one more if need be (`determine_expert_map`)."""
        if ranks == 1 or not self._split(name).startswith("expert"):
            return range(ranks)
        expert = int(_NUMBER.findall(name)[-1])
        each, more = divmod(self.experts, ranks)
        if expert < more * (each + 1):
            return (expert // (each + 1),)
        return (more + (expert - more * (each + 1)) // each,)

    def _layer_bytes(self, names: list[str], modules: Mapping[str, ModuleFormat]) -> int:
        """Bytes of one layer on a rank that holds it: neighbours of one kind are packed together."""
        split = self._split(names[0])
        if len(names) == 1:
            form = modules[names[0]]
            return self._checked(names[0], lambda: resident_bytes(form, split, self.ranks, self.heads, self.kernel))
        alignment = EXPERT_ALIGNMENT_BYTES if split.startswith("expert") else 1
        total = 0
        for module, rows, columns in self._segments(names, modules):
            total += segment_bytes(rows, columns, module, self.kernel, alignment)
        return total

    def _segments(self, names: list[str], modules: Mapping[str, ModuleFormat]) -> list[tuple[ModuleFormat, int, int]]:
        segments: list[tuple[ModuleFormat, int, int]] = []
        for name in names:
            rows, columns = self._rank_shape(name, modules[name])
            if segments and _kind(segments[-1][0]) == _kind(modules[name]):
                rows += segments.pop()[1]
            segments.append((modules[name], rows, columns))
        return segments

    def _rank_shape(self, name: str, module: ModuleFormat) -> tuple[int, int]:
        return self._checked(
            name, lambda: rank_shape(module.shape, self._split(name), self.ranks, self.heads, module.group_size)
        )

    def _checked(self, name: str, compute: Callable[[], Result]) -> Result:
        try:
            return compute()
        except InputError as error:
            raise InputError(f"{name}: {error}") from None

    def _layers(self, names: Iterable[str]) -> list[list[str]]:
        layers: dict[str, list[str]] = {}
        for name in names:
            fused = self.fused.get(kind_name(name))
            layers.setdefault(name if fused is None else layer_name(name, fused), []).append(name)
        order = {kind: place for place, kind in enumerate(self.fused)}
        return [sorted(layer, key=lambda n: order.get(kind_name(n), 0)) for layer in layers.values()]

    def _split(self, name: str) -> Split:
        split = self.splits.get(parent_of(name)) or self.splits.get(kind_name(name))
        if split is None:
            raise InputError(f"{name}: the plan has no such module; it is of another model")
        return split


_NUMBER = re.compile(r"\.(\d+)\.")


def _kind(module: ModuleFormat) -> tuple[int, int | None, bool | None]:
    return module.num_bits, module.group_size, module.symmetric
