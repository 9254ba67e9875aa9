"""Scores of candidates from more text than they were made with: what a cheap method does with the time it saves."""

import tempfile
from pathlib import Path

from torch import Tensor

from allocator.blocks.calibration import Calibration
from allocator.blocks.calibration.calibration_run import CalibrationRun
from allocator.blocks.hidden_states import HiddenStates
from allocator.contract.scores import Scores
from allocator.score import LearningSettings, learn_scores
from benchmarks.allocation.laboratory import Laboratory

__all__ = ["learn_on"]


def learn_on(lab: Laboratory, token_ids: Tensor, settings: LearningSettings) -> Scores:
    """Scores of the candidates of `lab` on the text `token_ids`, int64 `[S, T]`."""
    with tempfile.TemporaryDirectory() as folder:
        hidden = HiddenStates(Path(folder), *token_ids.shape, lab.inventory.config["hidden_size"])
        lab.stream.fill(hidden, token_ids)
        return learn_scores(CalibrationRun(lab.stream, Calibration(token_ids, "more text"), hidden), lab.bank, settings)
