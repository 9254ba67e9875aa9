"""Every module of a model folder with its shape, role and possible formats, from headers alone."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from allocator.contract.channel_blocks import ChannelOrder
from allocator.contract.errors import InputError
from allocator.contract.layout import (
    GROUP_SIZES,
    WIDTHS,
    Dtype16,
    ModuleFormat,
    module_bytes,
    usable_group_size,
)
from allocator.contract.modules import Rows, kind_name
from allocator.contract.resident import Split
from allocator.contract.safetensors_file import INDEX_NAME, StoredTensor, read_folder_headers
from allocator.model.architectures import Architecture, architecture_of
from allocator.model.context_length import cut_to
from allocator.model.expert_stacks import ExpertMatrix, unstacked
from allocator.model.hf_config import read_config
from allocator.model.other_names import SCORE_NAME
from allocator.model.quantized_source import DequantizedTensor, QuantizedSource, dequantized_view, split_quantization
from allocator.model.shape import ModelShape, ModuleKind, Role, read_shape

__all__ = ["Inventory", "Module", "Role", "read_inventory"]

_WEIGHT_DTYPES = ("BF16", "F16", "F32")
_MOST_SHOWN = 6
_PREDICTING = re.compile(r"(^|\.)mtp[._]")
_PREDICTING_BLOCKS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


@dataclass(frozen=True)
class Module:
    """One weight of the program. `shape` is `[out_features, in_features]`, `dtype` that of the source.

    `fused_group` is the full name of the vLLM layer that this module becomes a part of. `why_16` says why the
    module can only be stored at 16 bits; None if it can be quantized. `split` says how tensor parallelism cuts it.
    `parent` is the module of the original model of which this one is the rows `rows`: usually itself and all.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    role: Role
    block: int | None
    fused_group: str | None
    tensor: StoredTensor
    why_16: str | None
    split: Split
    parent: str
    rows: Rows

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Inventory:
    """A checked model folder.

    `dtype` is that of 16-bit weights and of scales in a checkpoint: the source's if it has 16 bits, else
    BF16; where float16 and float32 are mixed, what config.json says. `others` are copied bit for bit; of these the
    architecture does not know `unknown`. `dropped` are tensors that a checkpoint leaves out: the second copy
    of a tied lm_head; `needless` are those that only a quantized model has, scales of activations. `channels` is the
    order of the MLPs' channels where these are cut into pieces (see `allocator.model.channel_cuts`). `source` says how
    the files are quantized; `config` does not.
    """

    folder: Path
    architecture: str
    config: dict[str, Any]
    dtype: Dtype16
    tied: bool
    modules: tuple[Module, ...]
    others: tuple[StoredTensor, ...]
    dropped: tuple[StoredTensor, ...]
    blocks: int
    shape: ModelShape
    channels: ChannelOrder | None = None
    unknown: tuple[str, ...] = ()
    source: QuantizedSource | None = None
    needless: tuple[StoredTensor, ...] = ()

    @cached_property
    def _by_name(self) -> dict[str, StoredTensor]:
        return {t.name: t for t in self.tensors}

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """All tensors of a checkpoint of the model, at 16 bits."""
        return (*(module.tensor for module in self.modules), *self.others)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The tensors of the files that `tensors` are made of, each once."""
        return tuple({(t.path, t.name): t for tensor in self.tensors for t in tensor.in_files}.values())

    @property
    def weight_files(self) -> set[Path]:
        """The files that tensors are read from, those of dropped ones too."""
        return {t.path for tensor in (*self.tensors, *self.dropped, *self.needless) for t in tensor.in_files}

    @property
    def declared_config(self) -> dict[str, Any]:
        """config.json as far as it says what the model is, its quantization included."""
        return self.config if self.source is None else self.config | {"quantization_config": self.source.declaration}

    def tensor(self, name: str) -> StoredTensor:
        """The stored tensor `name`. Raises InputError when a checkpoint of the model has no such tensor."""
        if name not in self._by_name:
            raise InputError(f"{self.folder}: no tensor {name}")
        return self._by_name[name]

    def block_prefix(self, index: int) -> str:
        """What the names of block `index` begin with, the dot included."""
        return architecture_of(self.config)[1].block.replace("{i}", str(index)) + "."

    def parents(self, block: int) -> dict[str, list[Module]]:
        """The modules of decoder block `block` by the module of the original model that they are rows of."""
        found: dict[str, list[Module]] = {}
        for module in self.modules:
            if module.block == block:
                found.setdefault(module.parent, []).append(module)
        return found

    @property
    def parameters(self) -> int:
        """Weights of all modules."""
        return sum(module.parameters for module in self.modules)

    @property
    def language(self) -> dict[str, Any]:
        """The part of config.json that describes the language model."""
        return architecture_of(self.config)[1].language(self.config)

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model was made for, None where config.json does not say."""
        longest: int | None = self.language.get("max_position_embeddings")
        return longest or None

    def sequence_length(self, wanted: int) -> int:
        """Tokens of a sequence to run the model on: `wanted`, or `positions` where these are fewer."""
        return cut_to(wanted, self.positions)

    @property
    def other_bytes(self) -> int:
        """Bytes of all tensors that are copied."""
        return sum(t.nbytes for t in self.others)

    @property
    def predicting(self) -> tuple[StoredTensor, ...]:
        """The copied tensors of layers that predict further tokens (MTP), which a server runs only if it is told to."""
        block = re.compile(re.escape(architecture_of(self.config)[1].block).replace(r"\{i\}", r"(\d+)") + r"\.")
        found = []
        for tensor in self.others:
            number = block.match(tensor.name)
            if _PREDICTING.search(tensor.name) or (number is not None and int(number[1]) >= self.blocks):
                found.append(tensor)
        return tuple(found)

    @property
    def predicting_bytes(self) -> int | None:
        """Their bytes, a part of `other_bytes`; None for a model without."""
        return sum(tensor.nbytes for tensor in self.predicting) or None

    @property
    def fused_groups(self) -> dict[str, tuple[str, ...]]:
        """The modules of each fused group, in model order."""
        groups: dict[str, tuple[str, ...]] = {}
        for module in self.modules:
            if module.fused_group is not None:
                groups[module.fused_group] = (*groups.get(module.fused_group, ()), module.name)
        return groups

    @property
    def prefix(self) -> str | None:
        """What stands before the names of the files' tensors here (`model.`), None where they are the same."""
        first = self.modules[0].tensor
        return None if first.stored_as is None else first.name.removesuffix(first.stored_as)

    def told(self) -> list[str]:
        """What a reader of the files would not expect: one line each."""
        lines = []
        if self.prefix is not None:
            lines.append(f"tensors are named without {self.prefix!r} in the files; it is put before them")
        for dtype in sorted({m.dtype for m in self.modules} - {self.dtype}):
            names = [m.name for m in self.modules if m.dtype == dtype]
            lines.append(f"rounded from {dtype} to {self.dtype} where they are kept at 16 bits: {_shown(names)}")
        if self.source is not None:
            wholes = {t.name: t for t in (t.stack if isinstance(t, ExpertMatrix) else t for t in self.tensors)}
            names = [name for name, tensor in wholes.items() if isinstance(tensor, DequantizedTensor)]
            method = f"quantized already, by {self.source.method}"
            lines.append(f"{method}; dequantized to {self.dtype} as they are read: {_shown(names) or 'no tensors'}")
        if self.needless:
            lines.append(f"left out, of use to a quantized model only: {_shown([t.name for t in self.needless])}")
        predicting = {tensor.name for tensor in self.predicting}
        if predicting:
            lines.append(
                f"copied, {self.predicting_bytes:,} bytes, to predict further tokens where a server is told to "
                f"(vllm serve --speculative-config): {_shown(sorted(predicting))}"
            )
        if unknown := [name for name in self.unknown if name not in predicting]:
            lines.append(f"copied, though {self.architecture} has no such tensors: {_shown(unknown)}")
        return lines

    def module(self, name: str) -> Module:
        """Raises InputError when the model has no module `name`."""
        for module in self.modules:
            if module.name == name:
                return module
        raise InputError(f"{self.folder}: no module {name}; `gamma inspect` lists them")

    def formats(self, module: Module, widths: Iterable[int], group_size: int, symmetric: bool) -> list[ModuleFormat]:
        """Formats of `module` at each of `widths`, narrowest first; 16 bits are always among them.

        The group size is the largest that divides in_features and is at most `group_size`. Raises InputError
        for a width or a group size that does not exist.
        """
        wanted = set(widths)
        if not wanted <= set(WIDTHS):
            raise InputError(f"widths {sorted(wanted - set(WIDTHS))} do not exist; allowed are {list(WIDTHS)}")
        if group_size not in GROUP_SIZES:
            raise InputError(f"group size {group_size} does not exist; allowed are {list(GROUP_SIZES)}")
        formats = []
        usable = usable_group_size(module.shape[1], group_size)
        if module.why_16 is None and usable is not None:
            formats = [
                ModuleFormat.model_validate(
                    {"shape": module.shape, "num_bits": b, "group_size": usable, "symmetric": symmetric}
                )
                for b in sorted(wanted - {16})
            ]
        return [*formats, ModuleFormat(shape=module.shape, num_bits=16)]

    def feasible_bytes(self, widths: Iterable[int], group_size: int, symmetric: bool) -> tuple[int, int]:
        """Bytes of tensors of the smallest and the largest checkpoint with these candidates."""
        wanted = tuple(widths)
        sizes = [
            [module_bytes(f) for f in self.formats(module, wanted, group_size, symmetric)] for module in self.modules
        ]
        return self.other_bytes + sum(map(min, sizes)), self.other_bytes + sum(map(max, sizes))


def read_inventory(folder: Path) -> Inventory:
    """Read config.json and the safetensors headers of a Hugging Face model folder; check that they agree.

    Raises InputError for a model that cannot be used (unknown architecture, quantized so that it cannot be dequantized
    on reading, no safetensors, a tensor missing or of another shape or dtype), ContractError for damaged files.
    """
    config, source = split_quantization(read_config(folder), folder)
    shape = read_shape(config)
    if shape.plan_only is not None:
        raise InputError(f"{folder}: {shape.architecture} can be planned (`gamma plan`) only: {shape.plan_only}")
    rules = architecture_of(config)[1]
    headers, needless = dequantized_view(_read_headers(folder), source, shape.dtype)
    stored = unstacked(_with_prefix(headers, rules), shape)
    _refuse_more_blocks(folder, config, stored, shape.blocks)
    modules = [_module(folder, stored, kind, i, e) for kind, i, e in _in_model_order(shape)]
    if shape.head == "scores" and f"{SCORE_NAME}.bias" in stored:
        raise InputError(f"{folder}: {SCORE_NAME} has a bias, which learning does not take into account")
    head = stored.get(f"{rules.lm_head.name}.weight")
    dropped = (head,) if (shape.tied or shape.head != "tokens") and head is not None else ()
    known: set[str] = set()
    for other in shape.others:
        for name in other.names():
            if not name.startswith(shape.beside):  # whose names differ from release to release
                _checked(folder, stored, name, other.shape, other.terms)
            known.add(name)

    taken = {m.tensor.name for m in modules} | {t.name for t in dropped}
    others = tuple(sorted((t for n, t in stored.items() if n not in taken), key=lambda t: t.name))
    return Inventory(
        folder=folder,
        architecture=shape.architecture,
        config=config,
        dtype=_storage_dtype(folder, modules, shape.dtype),
        tied=shape.tied,
        modules=tuple(modules),
        others=others,
        unknown=tuple(t.name for t in others if t.name not in known and not t.name.startswith(shape.beside)),
        dropped=dropped,
        needless=needless,
        blocks=shape.blocks,
        shape=shape,
        source=source,
    )


def _in_model_order(shape: ModelShape) -> Iterator[tuple[ModuleKind, int | None, int]]:
    """Kind, block and expert of each module: the embedding, block after block, the head."""
    for kind in shape.modules:
        if kind.role == "embedding":
            yield kind, None, 0
    linears = [kind for kind in shape.modules if kind.role == "linear"]
    for block in range(shape.blocks):
        here = [kind for kind in linears if block in kind.blocks]
        for kind in (k for k in here if not k.experts):
            yield kind, block, 0
        mixed = [k for k in here if k.experts]
        for expert in range(mixed[0].experts if mixed else 0):
            for kind in mixed:
                yield kind, block, expert
    for kind in shape.modules:
        if kind.role == "lm_head":
            yield kind, None, 0


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    found = sorted(folder.glob("*.safetensors"))
    # Mistral's second copy of the weights, in names of its own.
    files = [path for path in found if not path.name.startswith("consolidated")]
    indexed = (folder / INDEX_NAME).exists()
    if not files and not indexed:
        others = found or sorted(p for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        only = f", only {', '.join(path.name for path in others[:3])}" if others else ""
        raise InputError(
            f"{folder}: no safetensors files{' in the format of Hugging Face' if found else ''}{only}; "
            "convert the model: load it with transformers and call save_pretrained"
        )
    if len(files) > 1 and not indexed:
        raise InputError(
            f"{folder}: {len(files)} safetensors files ({', '.join(path.name for path in files[:3])}) but no "
            f"{INDEX_NAME}; leave only those of the model, or add the index"
        )
    return read_folder_headers(folder, files)


def _refuse_more_blocks(folder: Path, config: dict[str, Any], stored: dict[str, StoredTensor], blocks: int) -> None:
    rules = architecture_of(config)[1]
    pattern = re.compile(re.escape(rules.block).replace(r"\{i\}", r"(\d+)") + r"\.")
    # Blocks for speculative decoding come after the others; they are copied.
    more = next((config[key] for key in _PREDICTING_BLOCKS if isinstance(config.get(key), int)), 0)
    for name in stored:
        match = pattern.match(name)
        if match and int(match[1]) >= blocks + more:
            raise InputError(
                f"{folder}: tensor {name} is of block {match[1]}, but {rules.block_count} in config.json is {blocks}"
            )


def _module(folder: Path, stored: dict[str, StoredTensor], kind: ModuleKind, block: int | None, expert: int) -> Module:
    def numbered(pattern: str) -> str:
        return pattern.replace("{i}", str(block)).replace("{e}", str(expert))

    name = numbered(kind.name)
    tensor = _checked(folder, stored, f"{name}.weight", kind.shape, kind.terms)
    if tensor.dtype not in _WEIGHT_DTYPES:
        raise InputError(f"{folder}: {tensor.name} has dtype {tensor.dtype}, allowed are {', '.join(_WEIGHT_DTYPES)}")
    return Module(
        name=name,
        shape=kind.shape,
        dtype=tensor.dtype,
        role=kind.role,
        block=block,
        fused_group=None if kind.fused is None else numbered(kind.fused),
        tensor=tensor,
        why_16=kind.why_16,
        split=kind.split,
        parent=name,
        rows=Rows(0, kind.shape[0]),
    )


def _checked(
    folder: Path, stored: dict[str, StoredTensor], name: str, shape: tuple[int, ...], terms: tuple[str, ...]
) -> StoredTensor:
    """The stored tensor `name`, present and of the shape that config.json says."""
    tensor = stored.get(name)
    if tensor is None:
        hint = "; is tie_word_embeddings missing from config.json?" if name.startswith("lm_head") else ""
        raise InputError(f"{folder}: tensor {name} (shape {list(shape)}) is missing from the files{hint}")
    if tensor.shape != shape:
        raise InputError(
            f"{folder}: tensor {name} has shape {list(tensor.shape)}, "
            f"config.json says {list(shape)} ({', '.join(terms)})"
        )
    return tensor


def _with_prefix(stored: dict[str, StoredTensor], rules: Architecture) -> dict[str, StoredTensor]:
    """Tensors by the names of the architecture, where a model was saved without its head: `layers.0.` for
    `model.layers.0.`, which transformers takes for the same."""
    prefix, _, rest = rules.embedding.name.partition(".")
    if f"{rules.embedding.name}.weight" in stored or f"{rest}.weight" not in stored:
        return stored
    renamed = {}
    for name, tensor in stored.items():
        full = name if name.startswith((f"{rules.lm_head.name}.", f"{SCORE_NAME}.")) else f"{prefix}.{name}"
        renamed[full] = replace(tensor, name=full, stored_as=name)
    return renamed


def _shown(names: Sequence[str]) -> str:
    """Names that differ in numbers only as one, with their count."""
    kinds = Counter(kind_name(name) for name in names)
    shown = [kind if count == 1 else f"{kind} ({count})" for kind, count in kinds.items()]
    return ", ".join(shown[:_MOST_SHOWN]) + (f" and {len(shown) - _MOST_SHOWN} more" if shown[_MOST_SHOWN:] else "")


def _storage_dtype(folder: Path, modules: list[Module], declared: Dtype16) -> Dtype16:
    dtypes = {m.dtype: m.name for m in modules}
    if "BF16" in dtypes and "F16" in dtypes:
        raise InputError(
            f"{folder}: {dtypes['BF16']} is BF16 and {dtypes['F16']} is F16; convert the model to one 16-bit dtype"
        )
    if dtypes.keys() == {"F16", "F32"}:  # servers cast to what config.json says
        return declared
    return "F16" if dtypes.keys() == {"F16"} else "BF16"
