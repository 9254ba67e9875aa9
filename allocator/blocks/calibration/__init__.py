"""Text to calibrate, select and measure on, as sequences of token ids: from files, or written by the model itself."""

from allocator.blocks.calibration.sequences import (
    Calibration,
    calibration_amount,
    calibration_from_model,
    calibration_from_python,
    calibration_from_text,
)

__all__ = [
    "Calibration",
    "calibration_amount",
    "calibration_from_model",
    "calibration_from_python",
    "calibration_from_text",
]
