"""The text that a model is calibrated on: what is given, else what the model writes, else that of Python."""

from allocator.blocks.calibration import (
    Calibration,
    calibration_from_model,
    calibration_from_python,
    calibration_from_text,
)
from allocator.model import Inventory
from allocator.pipeline.settings import CandidateSettings
from allocator.run.progress import Progress

__all__ = ["calibration_text", "told_amount"]

_LARGEST_WRITER_PARAMETERS = 2_000_000_000
"""Larger models do not write their own calibration text: in float32 they would need more than 8 GB of memory."""


def calibration_text(inventory: Inventory, candidates: CandidateSettings, progress: Progress) -> Calibration:
    (sequences, length), model, seed = candidates.amount(inventory), inventory.folder, candidates.seed
    writes = inventory.shape.head == "tokens" and inventory.parameters <= _LARGEST_WRITER_PARAMETERS
    if candidates.calibration is None and writes:
        return calibration_from_model(model, sequences, length, seed, progress)
    progress.begin("reading text")
    if candidates.calibration is None:
        return calibration_from_python(model, sequences, length, seed)
    return calibration_from_text(model, list(candidates.calibration), sequences, length, seed)


def told_amount(inventory: Inventory, candidates: CandidateSettings) -> str:
    sequences, length = candidates.amount(inventory)
    told = f"{sequences} sequences of {length} tokens"
    if candidates.amount_is_given:
        return told
    return f"{told}, by the model's {inventory.parameters:,} parameters (--sequences and --sequence-length change it)"
