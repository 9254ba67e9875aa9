"""Writes a gamma checkpoint and proves it: predicted bytes against written bytes, declarations against headers."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from allocator.blocks.tensors import read_tensor, torch_dtype, write_safetensors
from allocator.contract.checkpoint import DIGESTS_NAME, CheckpointConfig, check_checkpoint, digest_folder
from allocator.contract.compressed_tensors import compressed_tensors_config, unequal_groups
from allocator.contract.documents import write_atomically
from allocator.contract.errors import ContractError, InputError, StoppedError
from allocator.contract.layout import Dtype16, TensorSpec
from allocator.contract.manifest import MANIFEST_NAME, Manifest
from allocator.contract.outputs import check_output_folder, is_out_of_room
from allocator.contract.safetensors_file import INDEX_NAME
from allocator.export.files import MAX_SHARD_BYTES, CheckpointPlan, plan_checkpoint
from allocator.model import Inventory, SideFiles, carry, side_files
from allocator.quantize.bank_reader import BankReader
from allocator.run.journal import Journal
from allocator.run.progress import Progress, silent

__all__ = [
    "AS_GAMMA",
    "CheckpointSource",
    "Declaration",
    "ExportReport",
    "ExportSettings",
    "check_declarable",
    "check_target",
    "export_checkpoint",
]

Declaration = Literal["gamma", "compressed-tensors"]

_SHOWN_GROUPS = 3


def check_declarable(manifest: Manifest, inventory: Inventory, declaration: Declaration) -> None:
    """Raises InputError, with the names, when stock vLLM cannot load the manifest's widths."""
    if declaration == "gamma":
        return
    if manifest.channel_blocks is not None:
        raise InputError(
            f"the manifest cuts modules into {manifest.channel_blocks.blocks} channel blocks, which compressed-tensors "
            "cannot say; export with --format gamma, or learn and solve with --granularity module"
        )
    for module in inventory.modules:
        stored = manifest.modules[module.name]
        if module.role == "embedding" and stored.quantized:
            raise InputError(
                f"{module.name}: {stored.num_bits} bits, but stock vLLM and transformers look tokens up in a 16-bit "
                f"embedding; solve again with --pin '{module.name}=16', or export with --format gamma"
            )
    if not any(module.quantized for module in manifest.modules.values()):
        raise InputError("no module of the manifest is below 16 bits; the model itself is that checkpoint")
    unequal = unequal_groups(manifest.modules, inventory.fused_groups)
    if unequal:
        shown = [f"{layer} ({_ways(layer, ways)})" for layer, ways in list(unequal.items())[:_SHOWN_GROUPS]]
        more = f"; and {len(unequal) - _SHOWN_GROUPS} more" if len(unequal) > _SHOWN_GROUPS else ""
        raise InputError(
            f"compressed-tensors allows one width inside a layer that vLLM fuses, the manifest has several in "
            f"{'; '.join(shown)}{more}; solve again with --fusion tied, or export with --format gamma"
        )


def _ways(layer: str, ways: dict[str, str]) -> str:
    parent = layer.rpartition(".")[0] + "."
    return ", ".join(f"{name.removeprefix(parent)} {way}" for name, way in ways.items())


_JOURNAL = ".journal"


@dataclass(frozen=True)
class ExportReport:
    """Bytes of the safetensors files, by file name, as predicted from the manifest and as found on disk.

    `side_files` says what became of the other files of the model's folder.
    """

    folder: Path
    tensor_bytes: int
    predicted: dict[str, int]
    written: dict[str, int]
    side_files: SideFiles


@dataclass(frozen=True)
class CheckpointSource:
    """What a checkpoint is copied from: the model, with its channels as the bank has them, its digest, and the bank."""

    inventory: Inventory
    model_digest: str
    bank: BankReader


@dataclass(frozen=True)
class ExportSettings:
    """How the checkpoint is declared and cut into files; `overwrite` one that is there."""

    declaration: Declaration = "gamma"
    overwrite: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES


AS_GAMMA = ExportSettings()


def export_checkpoint(
    manifest: Manifest,
    source: CheckpointSource,
    out: Path,
    settings: ExportSettings = AS_GAMMA,
    progress: Progress = silent,
) -> ExportReport:
    """Write the checkpoint of `manifest` to `out`, through a temporary folder that is renamed when all is checked.

    An export that was killed goes on after the last file that it finished.

    Raises ContractError when manifest, bank and model do not belong together or one byte differs from the
    prediction, InputError when `out` exists (unless it may be overwritten), the disk has too little room, or the widths
    cannot be declared as asked.
    """
    _check_belongs(manifest, source)
    check_declarable(manifest, source.inventory, settings.declaration)
    plan = plan_checkpoint(manifest, source.inventory.others, settings.max_shard_bytes)
    if plan.tensor_bytes != manifest.tensor_bytes:
        raise ContractError(f"the plan has {plan.tensor_bytes} bytes of tensors, the manifest {manifest.tensor_bytes}")
    predicted = plan.file_bytes()
    check_target(out, sum(predicted.values()), settings.overwrite)

    target = _place(out)
    temporary = _partial(target)
    with _kept_where_it_helps(temporary):
        _begin(temporary, f"{manifest.digest} {settings.declaration} {settings.max_shard_bytes}")
        _write_tensors(manifest, source, plan, temporary, progress)
        _write_side_files(manifest, source.inventory, settings.declaration, temporary)
        written = {name: (temporary / name).stat().st_size for name in plan.files}
        if written != predicted:
            raise ContractError(f"predicted {predicted}, written {written}: this is a bug, please report it")
        check_checkpoint(temporary)
        progress.begin("digests")
        digest_folder(temporary, manifest).write(temporary / DIGESTS_NAME)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    return ExportReport(out, plan.tensor_bytes, predicted, written, side_files(source.inventory))


@contextmanager
def _kept_where_it_helps(temporary: Path) -> Iterator[None]:
    """What is written stays when the same command could go on from there, else it is removed."""
    try:
        yield
    except StoppedError:
        raise
    except Exception as error:
        if is_out_of_room(error):
            raise InputError(
                f"{temporary}: its disk is full; make room and give the same command again: it goes on from what is "
                "written there"
            ) from error
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_tensors(
    manifest: Manifest, source: CheckpointSource, plan: CheckpointPlan, folder: Path, progress: Progress
) -> None:
    """The files of `plan` that its journal does not have, and their index."""
    journal = Journal(folder / _JOURNAL)
    for name, tensors in progress.over(plan.files.items(), "writing", "file"):
        if journal.load(name) is None or not (folder / name).exists():
            write_safetensors(_content(tensors, manifest, source), folder / name)
            journal.save(name, True)
        else:
            progress.skip()
    journal.clear()
    if plan.index is not None:
        (folder / INDEX_NAME).write_text(plan.index, encoding="utf-8")


def _partial(out: Path) -> Path:
    """The folder that becomes `out`."""
    place = _place(out)
    return place.with_name(f".{place.name}.partial")


def _place(out: Path) -> Path:
    """Where `out` is: a link stays, and leads to the new folder."""
    return out.resolve() if out.is_symlink() or out.name in ("", "..") else out


def _begin(folder: Path, of: str) -> None:
    """What an earlier export left in `folder` is kept if it was `of` the same."""
    begun = folder / _JOURNAL / "manifest"
    if not begun.exists() or begun.read_text(encoding="utf-8") != of:
        shutil.rmtree(folder, ignore_errors=True)
        begun.parent.mkdir(parents=True)
        write_atomically(begun, of)


def _check_belongs(manifest: Manifest, source: CheckpointSource) -> None:
    inventory, bank = source.inventory, source.bank
    if manifest.model.digest != source.model_digest:
        raise ContractError(
            f"the manifest was solved for model {manifest.model.digest}, {inventory.folder} is {source.model_digest}; "
            "learn and solve again for this model"
        )
    if manifest.bank_digest != bank.bank.digest:
        raise ContractError(
            f"the manifest was solved for bank {manifest.bank_digest}, {bank.folder} is {bank.bank.digest}; "
            "give the bank it was solved for, or learn again"
        )
    shapes = {m.name: m.shape for m in inventory.modules}
    for name in sorted(shapes.keys() | manifest.modules.keys()):
        ours = shapes.get(name)
        theirs = manifest.modules[name].shape if name in manifest.modules else None
        if ours != theirs:
            raise ContractError(f"{name}: shape is {ours} in the model and {theirs} in the manifest")


def check_target(out: Path, needed: int, overwrite: bool) -> None:
    """Raises InputError when a checkpoint of `needed` bytes cannot be written to `out`."""
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists; give another --out or --overwrite")
    if out.exists() and overwrite and not (out / MANIFEST_NAME).exists() and any(out.iterdir()):
        raise InputError(f"{out} is no gamma checkpoint and is not overwritten; give another --out")
    check_output_folder(out, replaced=True)
    disk = out.resolve().parent
    while not disk.exists():
        disk = disk.parent
    begun = sum(path.stat().st_blocks * 512 for path in _partial(out).glob("*.safetensors"))
    free = shutil.disk_usage(disk).free
    if free + begun < needed:
        raise InputError(
            f"{out.parent} has {free} bytes free, the checkpoint needs {needed - begun}; "
            "make room or give another --out"
        )


def _content(tensors: list[TensorSpec], manifest: Manifest, source: CheckpointSource) -> dict[str, Tensor]:
    inventory = source.inventory
    content: dict[str, Tensor] = {}
    for spec in tensors:
        name, part = spec.name.rpartition(".")[::2]
        module = manifest.modules.get(name) if part.startswith("weight") else None
        if module is None:
            content[spec.name] = read_tensor(inventory.tensor(spec.name))
        elif not module.quantized:
            content[spec.name] = _rounded(spec.name, read_tensor(inventory.tensor(spec.name)), manifest.dtype)
        elif spec.name not in content:
            content |= {f"{name}.{p}": tensor for p, tensor in source.bank.tensors(name, module).items()}
    return {name: tensor.contiguous() for name, tensor in content.items()}


def _rounded(name: str, weight: Tensor, dtype: Dtype16) -> Tensor:
    kept = weight.to(torch_dtype(dtype))
    if kept.dtype != weight.dtype and not kept.isfinite().all():
        raise InputError(f"{name}: a weight is too large for {dtype}; convert the model to bfloat16 first")
    return kept


def _write_side_files(manifest: Manifest, inventory: Inventory, declaration: Declaration, folder: Path) -> None:
    """config.json with the declaration, the manifest, and tokenizer and generation files as they are."""
    carry(inventory, folder)
    config = dict(inventory.config)
    if declaration == "gamma":
        quantization = CheckpointConfig.of_manifest(manifest).model_dump(mode="json", exclude_none=True)
    else:
        quantization = compressed_tensors_config(manifest.modules)
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    manifest.write(folder / MANIFEST_NAME)
