"""What the verbs print with --json: plain dictionaries of what the tables show."""

from typing import TYPE_CHECKING, Any

from allocator.contract.layout import WIDTHS, module_bytes
from allocator.contract.manifest import Manifest
from allocator.contract.scores import Scores
from allocator.model import Inventory, side_files

if TYPE_CHECKING:  # brings torch
    from allocator.export import ExportReport

__all__ = ["export_document", "inventory_document", "manifest_rows", "scores_document"]


def inventory_document(inventory: Inventory, group_size: int, symmetric: bool) -> dict[str, Any]:
    """Every module with its shape and its bytes at every width, and the feasible range of budgets."""
    modules = {}
    for module in inventory.modules:
        formats = inventory.formats(module, WIDTHS, group_size, symmetric)
        entry: dict[str, Any] = {
            "shape": list(module.shape),
            "dtype": module.dtype,
            "role": module.role,
            "fused_group": module.fused_group,
            "group_size": formats[0].group_size,
            "nbytes": {str(f.num_bits): module_bytes(f) for f in formats},
        }
        modules[module.name] = entry | ({"why_16": module.why_16} if module.why_16 else {})
    low, high = inventory.feasible_bytes(WIDTHS, group_size, symmetric)
    files = side_files(inventory)
    return {
        "architecture": inventory.architecture,
        "blocks": inventory.blocks,
        "dtype": inventory.dtype,
        "tied": inventory.tied,
        "modules": modules,
        "other_bytes": inventory.other_bytes,
        "predicting_bytes": inventory.predicting_bytes or 0,
        "feasible_bytes": [low, high],
        "notes": inventory.told(),
        "unknown_tensors": list(inventory.unknown),
        "carried_files": list(files.carried),
        "left_out_files": files.left_out,
    }


def scores_document(scores: Scores) -> dict[str, Any]:
    """The scores by module and width, and what they were learned with."""
    low, high = scores.feasible_bytes()
    return {
        "method": scores.method,
        "unit": scores.unit,
        "digest": scores.digest,
        "settings": scores.settings,
        "feasible_bytes": [low, high],
        "modules": {n: {str(c.format.num_bits): c.score for c in m.candidates} for n, m in scores.modules.items()},
    }


def manifest_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """One row a module: its width, how it is stored, and its bytes."""
    return [
        {
            "module": name,
            "bits": form.num_bits,
            "group_size": form.group_size,
            "symmetric": form.symmetric,
            "out_features": form.shape[0],
            "in_features": form.shape[1],
            "bytes": manifest.module_bytes[name],
        }
        for name, form in manifest.modules.items()
    ]


def export_document(report: "ExportReport") -> dict[str, Any]:
    """Predicted and written bytes of each file, and why files of the model's folder are not in the checkpoint."""
    return {
        "checkpoint": str(report.folder),
        "tensor_bytes": report.tensor_bytes,
        "predicted_file_bytes": report.predicted,
        "written_file_bytes": report.written,
        "left_out": report.side_files.left_out,
    }
