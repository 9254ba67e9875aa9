"""A bank as a model folder: what must be in it, and the check that it can serve a manifest.

Beside `bank.json` and the candidates lie the model's `config.json`, its tokenizer files, its safetensors files (or
links to them) under their own names, and a `model.safetensors.index.json` that names these and no candidate.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from allocator.contract.bank import BANK_NAME, Bank, candidate_tensors
from allocator.contract.digest import digest_file
from allocator.contract.documents import parse_json, read_text_limited
from allocator.contract.errors import ContractError
from allocator.contract.expert_stacks import ExpertLayout, StackedMatrix, in_stack, matrices_of
from allocator.contract.layout import ModuleFormat
from allocator.contract.manifest import Manifest
from allocator.contract.safetensors_file import INDEX_NAME, StoredTensor, read_header

__all__ = ["LAYOUT_KEY", "ServedBank", "open_served_bank"]

LAYOUT_KEY = "expert_layout"
"""In the metadata of the index: how experts lie in tensors that hold those of a block."""

_INDEX_MAX_BYTES = 100_000_000
_SOURCE_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class ServedBank:
    """A checked pair of bank and manifest. `dropped` are source tensors that a checkpoint would leave out, `stacks`
    those that hold the experts of a block, by name, with the modules in them."""

    folder: Path
    bank: Bank
    manifest: Manifest
    dropped: frozenset[str]
    stacks: Mapping[str, list[StackedMatrix]] = field(default_factory=dict)

    @cached_property
    def _made_of(self) -> dict[str, list[str]]:
        return {original: list(modules) for original, modules in self.manifest.parents.rows().items()}

    def made_of(self, module: str) -> list[str]:
        """The manifest's modules that module `module` of the source becomes; none for others."""
        return self._made_of.get(module, [])

    def file(self, name: str) -> Path:
        """The file with the candidates of module `name`."""
        return self.folder / self.bank.modules[name].file


def open_served_bank(folder: Path, manifest_path: Path, *, digests: bool = False) -> ServedBank:
    """Check that `folder` can serve the manifest, from headers alone; `digests` also reads every file it needs.

    Raises ContractError naming the module at the first disagreement.
    """
    bank, manifest = Bank.read(folder / BANK_NAME), Manifest.read(manifest_path)
    if manifest.bank_digest != bank.digest:
        raise ContractError(
            f"{manifest_path} was solved for bank {manifest.bank_digest}, {folder} is {bank.digest}; "
            "solve again with the scores of this bank"
        )
    for name, module in manifest.modules.items():
        if module.quantized:
            _check_candidate(folder, bank, name, module, digests)
    source = _source_headers(folder, bank)
    stacks = _stacks(source, manifest)
    dropped = _check_source(folder, source, manifest, stacks)
    return ServedBank(folder, bank, manifest, dropped, stacks)


def _check_candidate(folder: Path, bank: Bank, name: str, module: ModuleFormat, digests: bool) -> None:
    stored = bank.modules.get(name)
    if stored is None or module not in stored.candidates:
        raise ContractError(f"{folder}: {name}: the bank has no {module.num_bits}-bit candidate like the manifest's")
    path = folder / stored.file
    header = read_header(path)
    for tensor in candidate_tensors(module, bank.dtype):
        found = header.get(tensor.name)
        if found is None or (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
            shown = f"{found.dtype} {list(found.shape)}" if found else "missing"
            raise ContractError(
                f"{path}: {name}: {tensor.name} is {shown}, {module.num_bits} bits at shape {list(module.shape)} "
                f"need {tensor.dtype} {list(tensor.shape)}"
            )
    if digests and (found_digest := digest_file(path)) != stored.file_digest:
        raise ContractError(f"{path}: {name}: content is {found_digest}, the bank says {stored.file_digest}")


@dataclass(frozen=True)
class _Source:
    """The tensors of the model's own files, the names that the index gives to a checkpoint, and its metadata."""

    tensors: dict[str, StoredTensor]
    indexed: set[str]
    metadata: Mapping[str, Any]


def _source_headers(folder: Path, bank: Bank) -> _Source:
    index = folder / INDEX_NAME
    if not index.exists() and bank.model.quantized_by is not None:
        raise ContractError(
            f"{folder}: this bank cannot be served by itself: the files of {bank.model.name} are quantized already "
            f"({bank.model.quantized_by}), and a server would have to dequantize what the manifest keeps at 16 bits; "
            "export a checkpoint with `gamma export`"
        )
    if not index.exists():
        raise ContractError(
            f"{folder}: no {INDEX_NAME}; this bank cannot be served by itself. Run `gamma learn` on it again, "
            "which adds what is missing, or export a checkpoint"
        )
    document = parse_json(read_text_limited(index, _INDEX_MAX_BYTES), index)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict):
        raise ContractError(f"{index}: no weight_map; the index is damaged")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ContractError(f"{index}: tensor {name} is said to be in {file!r}, which is no file name")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        tensors |= read_header(folder / file)
    missing = sorted(weight_map.keys() - tensors.keys())
    if missing:
        raise ContractError(f"{index}: tensor {missing[0]} is not in {weight_map[missing[0]]}")
    metadata = document.get("metadata")
    return _Source(tensors, set(weight_map), metadata if isinstance(metadata, dict) else {})


def _stacks(source: _Source, manifest: Manifest) -> dict[str, list[StackedMatrix]]:
    """The tensors of the source that are made of several of the manifest's modules."""
    layout: ExpertLayout = source.metadata.get(LAYOUT_KEY, "rows")
    if layout not in get_args(ExpertLayout):
        raise ContractError(
            f"{INDEX_NAME}: {LAYOUT_KEY} is {layout!r}, allowed are {', '.join(get_args(ExpertLayout))}"
        )
    shapes, found = manifest.parents.original_shapes(), {}
    for name in source.indexed:
        modules = matrices_of(name, layout)
        shape = shapes.get(modules[0].replace("{e}", "0")) if modules else None
        if shape is not None and (matrices := in_stack(name, source.tensors[name].shape, shape, layout)):
            found[name] = matrices
    return found


def _check_source(
    folder: Path, source: _Source, manifest: Manifest, stacks: Mapping[str, list[StackedMatrix]]
) -> frozenset[str]:
    shapes, tensors = manifest.parents.original_shapes(), source.tensors
    stacked = {matrix.module: tensors[name].dtype for name, matrices in stacks.items() for matrix in matrices}
    weights = {f"{name}.weight": name for name in shapes if name not in stacked}
    for tensor_name, name in weights.items():
        found, shape = tensors.get(tensor_name), shapes[name]
        if found is None or found.shape != shape or found.dtype not in _SOURCE_DTYPES:
            shown = f"{found.dtype} {list(found.shape)}" if found else "missing"
            raise ContractError(f"{folder}: {tensor_name} is {shown} in the model, the manifest says {list(shape)}")
    odd = next((name for name, dtype in stacked.items() if name not in shapes or dtype not in _SOURCE_DTYPES), None)
    if odd is not None:
        raise ContractError(
            f"{folder}: {odd} is {stacked[odd]} in a stack of the model, and no such module of the manifest"
        )
    others = sum(tensors[name].nbytes for name in source.indexed - weights.keys() - stacks.keys())
    if others != manifest.other_bytes:
        raise ContractError(
            f"{folder}: the tensors outside the program have {others} bytes, the manifest says {manifest.other_bytes}"
        )
    return frozenset(tensors.keys() - source.indexed)
