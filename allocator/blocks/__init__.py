"""A Hugging Face causal language model run one decoder block at a time, so that one block is resident."""

from allocator.blocks.calibration import (
    Calibration,
    calibration_from_model,
    calibration_from_python,
    calibration_from_text,
)
from allocator.blocks.stream import BlockStream

__all__ = [
    "BlockStream",
    "Calibration",
    "calibration_from_model",
    "calibration_from_python",
    "calibration_from_text",
]
