"""What `gamma sweep --measure` measures, models of experts included."""

from collections.abc import Callable
from pathlib import Path

import pytest

from allocator.contract.errors import ContractError
from allocator.pipeline import CandidateSettings, learn
from allocator.pipeline.measure import MeasureSettings, TextSettings, measure_assignments
from allocator.score import LearningSettings
from allocator.solve.many_budgets import uniform_plans


def test_each_expert_counts(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model, text = tiny_model("qwen3_moe"), tmp_path / "text.txt"
    text.write_text("some words that nobody calibrated on, again and again. " * 40)
    candidates = CandidateSettings(quantizer="rtn", group_size=32, widths=(2, 8, 16), sequences=2, sequence_length=32)
    learned = learn(model, tmp_path / "work", candidates, LearningSettings(draws=1))
    plans = {str(plan.num_bits): plan.assignment for plan in uniform_plans(learned.scores)}
    expert = next(name for name in plans["16"] if ".experts." in name)
    for bits in ("2", "8"):  # that expert alone
        plans[f"expert {bits}"] = plans["16"] | {
            name: plans[bits][name] for name in plans["16"] if name.startswith(expert.rpartition(".")[0])
        }
    settings = MeasureSettings(model, learned.bank_folder, TextSettings([text], 4, 32, seed=1))
    found = measure_assignments(learned.scores, plans, settings)
    assert abs(found["16"]) < 1e-9
    assert found["2"] > found["8"] > 0
    assert found["2"] > found["expert 2"] > found["expert 8"] > 0
    other = learned.scores.model_copy(update={"bank_digest": "sha256:" + 64 * "0"})
    with pytest.raises(ContractError, match="give their bank"):
        measure_assignments(other, plans, settings)
