"""Experts that calibration text hardly chose are not free."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from allocator.pipeline import CandidateSettings, learn
from allocator.score import LearningSettings
from allocator.score.expert_counts import HALF_BELIEVED, with_credibility


def test_scores_are_drawn_to_those_of_the_others_the_fewer_tokens_chose_the_expert() -> None:
    k, many = HALF_BELIEVED, 10**9
    own = {0: 4.0, 1: 0.0, 2: 2.0, 3: 1.0}
    counts = {f"b.experts.{e}": n for e, n in enumerate((many, 0, many, k))}
    scores = {f"b.experts.{e}.up_proj": torch.tensor([s, 0.0], dtype=torch.float64) for e, s in own.items()}
    scores |= {"b.experts.0.down_proj": torch.tensor([9.0, 0.0]), "b.q_proj": torch.tensor([0.0, 0.0])}
    found = with_credibility(scores, counts)
    mean = (4.0 + 2.0 + 0.5 * 1.0) / 2.5
    for expert, expected in enumerate((4.0, mean, 2.0, 0.5 * 1.0 + 0.5 * mean)):
        assert found[f"b.experts.{expert}.up_proj"].tolist() == [pytest.approx(expected), 0.0]
    assert found["b.experts.0.down_proj"].tolist() == [9.0, 0.0]
    assert torch.equal(found["b.q_proj"], scores["b.q_proj"])


def test_experts_that_no_token_chose_are_told_and_keep_their_bits(
    tiny_model: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The router of block 1 never chooses expert 7."""
    model = Path(shutil.copytree(tiny_model("qwen3_moe"), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.gate.weight"][:] = 0  # ties go to the first ones
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    candidates = CandidateSettings(quantizer="rtn", group_size=32, widths=(2, 4, 16), sequences=4, sequence_length=32)
    with caplog.at_level("WARNING", "allocator"):
        scores = learn(model, tmp_path / "work", candidates, LearningSettings(draws=2)).scores
    few = scores.settings["outcome"]["hardly_seen_experts"]
    dead = [name for name, count in few.items() if count == 0 and ".layers.1." in name]
    assert dead
    assert f"never chose {sum(count == 0 for count in few.values())}" in caplog.text
    assert all(
        scores.modules[f"{name}.{m}_proj"].candidates[0].score > 0 for name in dead for m in ("gate", "up", "down")
    )
