"""Writes checkpoints: the chosen candidates, packed, as an ordinary Hugging Face folder."""

from allocator.exporting.checkpoint import ExportReport, check_target, export_checkpoint
from allocator.exporting.declaration import Declaration, check_declarable
from allocator.exporting.plan import CheckpointPlan, plan_checkpoint

__all__ = [
    "CheckpointPlan",
    "Declaration",
    "ExportReport",
    "check_declarable",
    "check_target",
    "export_checkpoint",
    "plan_checkpoint",
]
