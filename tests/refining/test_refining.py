"""Refining keeps the budget and never ends worse than it began; the uniform plan is the widest that fits."""

from collections.abc import Callable
from pathlib import Path

import pytest

from allocator.blocks import BlockStream, calibration_from_model
from allocator.candidates import BankReader
from allocator.contract.layout import module_bytes
from allocator.inventory import read_inventory
from allocator.learning import LearningSettings
from allocator.pipeline import CandidateSettings, LearnResult, learn
from allocator.refining import refine, uniform_assignment
from allocator.solving.units import Rules
from allocator.student import Student

CANDIDATES = CandidateSettings(quantizer="rtn", group_size=32, sequences=16, sequence_length=32)


@pytest.fixture(scope="module")
def learned(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> LearnResult:
    return learn(tiny_model("llama"), tmp_path_factory.mktemp("work"), CANDIDATES, LearningSettings(batch_tokens=256))


def test_refining_a_poor_plan(learned: LearnResult, tiny_model: Callable[[str], Path]) -> None:
    inventory = read_inventory(tiny_model("llama"))
    tokens = calibration_from_model(tiny_model("llama"), 16, 32, 1).token_ids
    student = Student(BlockStream(inventory), BankReader(learned.bank_folder), tokens)
    scores = learned.scores
    plan = {name: module.candidates[-1].format for name, module in scores.modules.items()}
    for i, name in enumerate(learned.scores.modules):
        forms = [c.format for c in scores.modules[name].candidates]
        if len(forms) > 1:
            plan[name] = forms[i % 4]
    budget = scores.other_bytes + sum(map(module_bytes, plan.values()))
    pinned = next(name for name in plan if "up_proj" in name)
    rules = Rules({pinned: plan[pinned].num_bits}, {}, {})
    ticks = iter(range(10_000))
    found = refine(student, scores, plan, budget, 60, rules, clock=lambda: next(ticks))
    assert found.kept > 0
    assert found.kl < found.kl_before
    assert scores.other_bytes + sum(map(module_bytes, found.assignment.values())) <= budget
    assert found.assignment[pinned] == plan[pinned]
    assert float(student.losses(found.assignment).kl.mean()) == pytest.approx(found.kl, rel=1e-5)
    assert float(student.losses(plan).kl.mean()) == pytest.approx(found.kl_before, rel=1e-5)


def test_the_uniform_plan(learned: LearnResult) -> None:
    scores = learned.scores
    low, high = scores.feasible_bytes()
    assert uniform_assignment(scores, low - 1) is None
    for budget in (low, (low + high) // 2, high):
        plan = uniform_assignment(scores, budget)
        assert plan is not None
        widths = {f.num_bits for name, f in plan.items() if len(scores.modules[name].candidates) > 1}
        assert len(widths) == 1
        assert scores.other_bytes + sum(map(module_bytes, plan.values())) <= budget
    plan = uniform_assignment(scores, (low + high) // 2, floors={"*.down_proj": 8}, ceilings={"*.q_proj": 3})
    assert plan is not None
    assert all(f.num_bits >= 8 for name, f in plan.items() if "down_proj" in name)
    assert all(f.num_bits <= 3 for name, f in plan.items() if "q_proj" in name)
