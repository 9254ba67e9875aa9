"""From a manifest to a checkpoint."""

from pathlib import Path

from allocator.contract.manifest import Manifest
from allocator.export import (
    AS_GAMMA,
    CheckpointSource,
    ExportReport,
    ExportSettings,
    check_declarable,
    check_target,
    export_checkpoint,
)
from allocator.model import read_inventory
from allocator.pipeline.model_folder import digest_of_model, work_folder_at
from allocator.quantize import BankReader
from allocator.run.progress import Progress, silent

__all__ = ["export"]


def export(
    manifest: Manifest,
    model: Path,
    bank_folder: Path,
    out: Path,
    settings: ExportSettings = AS_GAMMA,
    progress: Progress = silent,
) -> ExportReport:
    """Write the checkpoint of `manifest` to `out`. What can be checked is checked before the model is read."""
    check_target(out, manifest.tensor_bytes, settings.overwrite)
    inventory, bank = read_inventory(model), BankReader(bank_folder)
    arranged = bank.arranged(inventory)
    check_declarable(manifest, arranged, settings.declaration)
    digest = digest_of_model(inventory, work_folder_at(bank_folder.parent), progress)
    return export_checkpoint(manifest, CheckpointSource(arranged, digest, bank), out, settings, progress)
