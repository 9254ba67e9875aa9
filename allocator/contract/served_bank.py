"""A bank as a model folder: what must be in it, and the check that it can serve a manifest.

Beside `bank.json` and the candidates lie the model's `config.json`, its tokenizer files, its safetensors files (or
links to them) under their own names, and a `model.safetensors.index.json` that names these and no candidate.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from allocator.contract.bank import BANK_NAME, Bank, candidate_tensors
from allocator.contract.digest import digest_file
from allocator.contract.documents import parse_json, read_text_limited
from allocator.contract.errors import ContractError
from allocator.contract.layout import ModuleFormat
from allocator.contract.manifest import Manifest
from allocator.contract.safetensors_file import INDEX_NAME, StoredTensor, read_header

__all__ = ["ServedBank", "open_served_bank"]

_INDEX_MAX_BYTES = 100_000_000
_SOURCE_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class ServedBank:
    """A checked pair of bank and manifest. `dropped` are source tensors that a checkpoint would leave out."""

    folder: Path
    bank: Bank
    manifest: Manifest
    dropped: frozenset[str]

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
    source = _source_headers(folder)
    dropped = _check_source(folder, source, manifest)
    return ServedBank(folder, bank, manifest, dropped)


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


def _source_headers(folder: Path) -> tuple[dict[str, StoredTensor], set[str]]:
    """The tensors of the model's own files, and the names that the index gives to a checkpoint."""
    index = folder / INDEX_NAME
    if not index.exists():
        raise ContractError(
            f"{folder}: no {INDEX_NAME}; this bank cannot be served by itself. Run `gamma learn` on it again, "
            "which adds what is missing, or export a checkpoint (the only way where the model was quantized already or "
            "has the experts of a block in one tensor)"
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
    return tensors, set(weight_map)


def _check_source(folder: Path, source: tuple[dict[str, StoredTensor], set[str]], manifest: Manifest) -> frozenset[str]:
    tensors, indexed = source
    shapes = manifest.parents.original_shapes()
    weights = {f"{name}.weight": name for name in shapes}
    for tensor_name, name in weights.items():
        found, shape = tensors.get(tensor_name), shapes[name]
        if found is None or found.shape != shape or found.dtype not in _SOURCE_DTYPES:
            shown = f"{found.dtype} {list(found.shape)}" if found else "missing"
            raise ContractError(f"{folder}: {tensor_name} is {shown} in the model, the manifest says {list(shape)}")
    others = sum(tensors[name].nbytes for name in indexed - weights.keys())
    if others != manifest.other_bytes:
        raise ContractError(
            f"{folder}: the tensors outside the program have {others} bytes, the manifest says {manifest.other_bytes}"
        )
    return frozenset(tensors.keys() - indexed)
