"""From learning to a checkpoint on every kind of block: experts, fused on disk, sliding windows."""

from collections.abc import Callable
from pathlib import Path

import pytest

from allocator.contract.checkpoint import check_checkpoint
from allocator.pipeline import CandidateSettings, export, learn
from allocator.score import LearningSettings
from allocator.solve import SolveSettings, solve_scores


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "phi3", "gemma3"])
def test_learn_solve_export(kind: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model(kind)
    candidates = CandidateSettings(quantizer="gptq", group_size=32, widths=(2, 4, 16), sequences=4, sequence_length=32)
    learned = learn(model, tmp_path / "work", candidates, LearningSettings())
    blocks = {name: m for name, m in learned.scores.modules.items() if ".layers." in name}
    experts = 2 * 3 * {"qwen3_moe": 8, "mixtral": 4}.get(kind, 0)
    assert sum(".experts." in name for name in blocks) == experts
    narrow, middle, full = (sum(m.candidates[i].score for m in blocks.values()) for i in range(3))
    assert narrow > middle > full == pytest.approx(0, abs=1e-6)
    manifest = solve_scores(learned.scores, SolveSettings(average_bits=4.0))
    export(manifest, model, learned.bank_folder, tmp_path / "out")
    declared, _ = check_checkpoint(tmp_path / "out")
    assert {m.num_bits for name, m in declared.modules.items() if name in blocks} >= {2, 4}
