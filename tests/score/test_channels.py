"""Candidates of channel blocks are measured by their own channels alone."""

from collections.abc import Callable
from pathlib import Path

import pytest

from allocator.pipeline import CandidateSettings, learn
from allocator.score import LearningSettings, swaps


def test_scores_are_those_of_whole_blocks(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = CandidateSettings(
        quantizer="rtn", group_size=32, widths=(2, 4, 16), sequences=4, sequence_length=32, channel_blocks=3
    )
    settings = LearningSettings(batch_tokens=64)
    pieces = learn(tiny_model("qwen3"), tmp_path / "pieces", candidates, settings).scores
    monkeypatch.setattr(swaps, "measurable_piece", lambda _block, _name: None)
    whole = learn(tiny_model("qwen3"), tmp_path / "whole", candidates, settings).scores
    assert list(pieces.modules) == list(whole.modules)
    for name, module in whole.modules.items():
        expected = [c.score for c in module.candidates]
        assert [c.score for c in pieces.modules[name].candidates] == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_where_a_norm_follows_the_mlp_the_whole_block_is_run(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    candidates = CandidateSettings(
        quantizer="rtn", group_size=32, widths=(2, 16), sequences=2, sequence_length=32, channel_blocks=2
    )
    scores = learn(tiny_model("gemma3"), tmp_path / "work", candidates, LearningSettings(draws=2)).scores
    assert scores.modules["model.layers.1.mlp.gate_proj.rows.0"].candidates[0].score > 0
