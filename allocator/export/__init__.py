"""Writes checkpoints: the chosen candidates, packed, as an ordinary Hugging Face folder."""

from allocator.export.files import CheckpointPlan, plan_checkpoint
from allocator.export.write_checkpoint import (
    AS_GAMMA,
    CheckpointSource,
    Declaration,
    ExportReport,
    ExportSettings,
    check_declarable,
    check_target,
    export_checkpoint,
)

__all__ = [
    "AS_GAMMA",
    "CheckpointPlan",
    "CheckpointSource",
    "Declaration",
    "ExportReport",
    "ExportSettings",
    "check_declarable",
    "check_target",
    "export_checkpoint",
    "plan_checkpoint",
]
