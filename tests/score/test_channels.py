"""Candidates of channel blocks have scores of their own (that these are right: test_swaps)."""

from collections.abc import Callable
from pathlib import Path

from allocator.pipeline import CandidateSettings, learn
from allocator.score import LearningSettings


def test_pieces_have_scores_also_where_a_norm_follows_the_mlp(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    candidates = CandidateSettings(
        quantizer="rtn", group_size=32, widths=(2, 16), sequences=2, sequence_length=32, channel_blocks=2
    )
    scores = learn(tiny_model("gemma3"), tmp_path / "work", candidates, LearningSettings(draws=2)).scores
    assert scores.modules["model.layers.1.mlp.gate_proj.rows.0"].candidates[0].score > 0
