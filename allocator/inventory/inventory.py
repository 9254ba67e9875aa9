"""Every module of a model folder with its shape, role and possible formats, from headers alone."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from allocator.contract.documents import parse_json, read_text_limited
from allocator.contract.errors import InputError
from allocator.contract.layout import (
    GROUP_SIZES,
    PACK_UNIT,
    WIDTHS,
    Dtype16,
    ModuleFormat,
    module_bytes,
    usable_group_size,
)
from allocator.contract.safetensors_file import INDEX_NAME, StoredTensor, read_folder_headers
from allocator.inventory.architectures import Architecture, architecture_of

__all__ = ["Inventory", "Module", "Role", "read_inventory"]

Role = Literal["linear", "embedding", "lm_head"]

_CONFIG_MAX_BYTES = 64 << 20
_WEIGHT_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Module:
    """One weight of the program. `shape` is `[out_features, in_features]`, `dtype` that of the source.

    `fused_group` is the full name of the vLLM layer that this module becomes a part of. `why_16` says why the
    module can only be stored at 16 bits; None if it can be quantized.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    role: Role
    block: int | None
    fused_group: str | None
    tensor: StoredTensor
    why_16: str | None

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Inventory:
    """A checked model folder.

    `dtype` is that of 16-bit weights and of scales in a checkpoint: the source's if it has 16 bits, else
    BF16. `others` are copied bit for bit. `dropped` are tensors that a checkpoint leaves out: the second copy
    of a tied lm_head.
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

    @cached_property
    def _by_name(self) -> dict[str, StoredTensor]:
        return {t.name: t for t in (*(m.tensor for m in self.modules), *self.others)}

    def tensor(self, name: str) -> StoredTensor:
        """The stored tensor `name`. Raises InputError when a checkpoint of the model has no such tensor."""
        if name not in self._by_name:
            raise InputError(f"{self.folder}: no tensor {name}")
        return self._by_name[name]

    def block_prefix(self, index: int) -> str:
        """What the names of block `index` begin with, the dot included."""
        return architecture_of(self.config)[1].block.replace("{i}", str(index)) + "."

    @property
    def other_bytes(self) -> int:
        """Bytes of all tensors that are copied."""
        return sum(t.nbytes for t in self.others)

    @property
    def fused_groups(self) -> dict[str, tuple[str, ...]]:
        """The modules of each fused group, in model order."""
        groups: dict[str, tuple[str, ...]] = {}
        for module in self.modules:
            if module.fused_group is not None:
                groups[module.fused_group] = (*groups.get(module.fused_group, ()), module.name)
        return groups

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

    Raises InputError for a model that cannot be used (unknown architecture, already quantized, no
    safetensors, a tensor missing or of another shape or dtype), ContractError for damaged files.
    """
    config = _read_config(folder)
    name, rules = architecture_of(config)
    stored = _read_headers(folder)
    blocks = rules.dimension(rules.block_count, config)
    _refuse_more_blocks(folder, rules, stored, blocks)
    tied = _flag(config, "tie_word_embeddings")

    modules = [_module(folder, rules, config, stored, rules.embedding.name, rules.embedding.shape, "embedding")]
    for i in range(blocks):
        for linear, shape in rules.linears.items():
            modules.append(_module(folder, rules, config, stored, linear, shape, "linear", i))
    head = f"{rules.lm_head.name}.weight"
    dropped = tuple(t for t in [stored.get(head)] if tied and t is not None)
    if not tied:
        modules.append(_module(folder, rules, config, stored, rules.lm_head.name, rules.lm_head.shape, "lm_head"))
    _check_others(folder, rules, config, stored, blocks)

    taken = {m.tensor.name for m in modules} | {t.name for t in dropped}
    return Inventory(
        folder=folder,
        architecture=name,
        config=config,
        dtype=_storage_dtype(folder, modules),
        tied=tied,
        modules=tuple(modules),
        others=tuple(sorted((t for n, t in stored.items() if n not in taken), key=lambda t: t.name)),
        dropped=dropped,
        blocks=blocks,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; download the model first, for example with `hf download`")
    if not path.exists():
        raise InputError(f"{folder}: no config.json; expected a Hugging Face model folder")
    config = parse_json(read_text_limited(path, _CONFIG_MAX_BYTES), path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object")
    for key in ("quantization_config", "compression_config"):
        quantized = config.get(key)
        if quantized:
            method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
            raise InputError(
                f"{path}: the model is already quantized ({key}, quant_method {method!r}); "
                "give the original 16-bit or 32-bit model"
            )
    return config


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    indexed = (folder / INDEX_NAME).exists()
    if not files and not indexed:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        found = f", only {', '.join(others[:3])}" if others else ""
        raise InputError(
            f"{folder}: no safetensors files{found}; "
            "convert the model: load it with transformers and call save_pretrained"
        )
    if len(files) > 1 and not indexed:
        raise InputError(
            f"{folder}: {len(files)} safetensors files ({', '.join(files[:3])}) but no {INDEX_NAME}; "
            "leave only those of the model, or add the index"
        )
    return read_folder_headers(folder)


def _flag(config: dict[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"config.json: {key} must be true or false, given {value!r}")
    return bool(value)


def _refuse_more_blocks(folder: Path, rules: Architecture, stored: dict[str, StoredTensor], blocks: int) -> None:
    pattern = re.compile(re.escape(rules.block).replace(r"\{i\}", r"(\d+)") + r"\.")
    for name in stored:
        match = pattern.match(name)
        if match and int(match[1]) >= blocks:
            raise InputError(
                f"{folder}: tensor {name} is of block {match[1]}, but {rules.block_count} in config.json is {blocks}"
            )


def _module(
    folder: Path,
    rules: Architecture,
    config: dict[str, Any],
    stored: dict[str, StoredTensor],
    local_name: str,
    dimensions: tuple[str, str],
    role: Role,
    block: int | None = None,
) -> Module:
    prefix = "" if block is None else rules.block.replace("{i}", str(block)) + "."
    name = prefix + local_name
    tensor = _checked(folder, rules, config, stored, f"{name}.weight", dimensions)
    if tensor.dtype not in _WEIGHT_DTYPES:
        raise InputError(f"{folder}: {tensor.name} has dtype {tensor.dtype}, allowed are {', '.join(_WEIGHT_DTYPES)}")
    group = rules.fused_group_of(local_name) if role == "linear" else None
    shape = (tensor.shape[0], tensor.shape[1])
    return Module(
        name=name,
        shape=shape,
        dtype=tensor.dtype,
        role=role,
        block=block,
        fused_group=None if group is None else prefix + group,
        tensor=tensor,
        why_16=_why_16(role, shape[1]),
    )


def _why_16(role: Role, in_features: int) -> str | None:
    if role != "linear":
        return f"this release keeps {role} at 16 bits"
    if in_features % PACK_UNIT:
        return f"in_features {in_features} is no multiple of {PACK_UNIT}"
    return None


def _checked(
    folder: Path,
    rules: Architecture,
    config: dict[str, Any],
    stored: dict[str, StoredTensor],
    name: str,
    dimensions: tuple[str, ...],
) -> StoredTensor:
    """The stored tensor `name`, present and of the shape that config.json says."""
    tensor, shape = stored.get(name), rules.shape(dimensions, config)
    if tensor is None:
        hint = "; is tie_word_embeddings missing from config.json?" if name.startswith(rules.lm_head.name) else ""
        raise InputError(f"{folder}: tensor {name} (shape {list(shape)}) is missing from the files{hint}")
    if tensor.shape != shape:
        raise InputError(
            f"{folder}: tensor {name} has shape {list(tensor.shape)}, "
            f"config.json says {list(shape)} ({', '.join(dimensions)})"
        )
    return tensor


def _check_others(
    folder: Path, rules: Architecture, config: dict[str, Any], stored: dict[str, StoredTensor], blocks: int
) -> None:
    for other in rules.others:
        if other.when is not None and not _flag(config, other.when):
            continue
        for i in range(blocks) if "{i}" in other.name else range(1):
            _checked(folder, rules, config, stored, other.name.replace("{i}", str(i)), other.shape)


def _storage_dtype(folder: Path, modules: list[Module]) -> Dtype16:
    dtypes = {m.dtype: m.name for m in modules}
    if "BF16" in dtypes and "F16" in dtypes:
        raise InputError(
            f"{folder}: {dtypes['BF16']} is BF16 and {dtypes['F16']} is F16; convert the model to one 16-bit dtype"
        )
    return "F16" if dtypes.keys() == {"F16"} else "BF16"
