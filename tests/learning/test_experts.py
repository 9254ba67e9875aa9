"""Candidates of experts are measured on the tokens that chose them, and experts that none chose are not free."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allocator.learning import LearningSettings, block
from allocator.learning.tables import with_unseen_experts
from allocator.pipeline import CandidateSettings, learn


def test_scores_are_those_of_whole_blocks(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = CandidateSettings(quantizer="rtn", group_size=32, widths=(2, 4, 16), sequences=4, sequence_length=32)
    settings = LearningSettings(batch_tokens=64)
    sparse = learn(tiny_model("qwen3_moe"), tmp_path / "sparse", candidates, settings).scores
    monkeypatch.setattr(block, "is_expert", lambda _block, _name: False)
    whole = learn(tiny_model("qwen3_moe"), tmp_path / "whole", candidates, settings).scores
    for name, module in whole.modules.items():
        expected = [c.score for c in module.candidates]
        assert [c.score for c in sparse.modules[name].candidates] == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_experts_that_no_token_chose_lose_what_the_others_lose() -> None:
    losses = {
        "self_attn.q_proj": torch.zeros(2),
        "mlp.experts.0.up_proj": torch.tensor([4.0, 0.0]),
        "mlp.experts.1.up_proj": torch.zeros(2),
        "mlp.experts.2.up_proj": torch.tensor([2.0, 0.0]),
        "mlp.experts.0.down_proj": torch.tensor([9.0, 0.0]),
    }
    found = with_unseen_experts(losses)
    assert found["mlp.experts.1.up_proj"].tolist() == [3.0, 0.0]
    assert all(torch.equal(found[name], losses[name]) for name in losses if name != "mlp.experts.1.up_proj")
