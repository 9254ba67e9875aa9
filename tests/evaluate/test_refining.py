"""Refining keeps the budget and never ends worse than it began; the uniform plan is the widest that fits."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allocator.blocks import BlockStream
from allocator.blocks.calibration import calibration_from_model
from allocator.cli.main import main
from allocator.contract.errors import InputError
from allocator.contract.layout import module_bytes
from allocator.contract.manifest import Budget, Manifest
from allocator.evaluate import RefineSettings, Student, refine, uniform_assignments, verify_against_uniform
from allocator.evaluate.refinement import FAILURES, below_zero
from allocator.model import read_inventory, read_shape
from allocator.pipeline import CandidateSettings, LearnResult, SolveSettings, learn, solve_scores
from allocator.plan import PlannedWeights, PlanRequest, make_plan, memory_device
from allocator.quantize import BankReader
from allocator.score import LearningSettings
from allocator.solve.units import Rules

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
            plan[name] = forms[i % 4 + 1]  # with its embedding at 2 bits this model is beyond what gradients tell
    budget = scores.other_bytes + sum(map(module_bytes, plan.values()))
    pinned = next(name for name in plan if "up_proj" in name)
    rules = Rules({pinned: plan[pinned].num_bits}, {}, {})
    ticks = iter(range(10_000))
    found = refine(student, scores, plan, RefineSettings(budget, 60, rules, clock=lambda: next(ticks)))
    assert found.kept > 0
    assert found.kl < found.kl_before
    assert scores.other_bytes + sum(map(module_bytes, found.assignment.values())) <= budget
    assert found.assignment[pinned] == plan[pinned]
    assert float(student.losses(found.assignment).kl.mean()) == pytest.approx(found.kl, rel=1e-5)
    assert float(student.losses(plan).kl.mean()) == pytest.approx(found.kl_before, rel=1e-5)


def test_changes_of_no_worth_are_seldom_kept() -> None:
    """Until the search gives up, which is after six in a row that are not kept."""
    differences = torch.randn(4000, FAILURES, 32, generator=torch.Generator().manual_seed(0))
    by_chance = [any(below_zero(one) for one in tries) for tries in differences]
    assert sum(by_chance) / len(by_chance) < 0.1


def test_uniform_plans_are_the_widest_that_fit(learned: LearnResult) -> None:
    scores = learned.scores
    low, high = scores.feasible_bytes()
    assert uniform_assignments(scores, low - 1) == []
    free = [name for name, module in scores.modules.items() if len(module.candidates) > 1]
    vocabulary = [name for name in free if name in ("model.embed_tokens", "lm_head")]
    assert vocabulary
    for budget in (low, (low + high) // 2, (low + 3 * high) // 4, high):
        for plan in uniform_assignments(scores, budget):
            assert len({plan[name].num_bits for name in free if name not in vocabulary}) == 1
            assert scores.other_bytes + sum(map(module_bytes, plan.values())) <= budget
    alike, wide = uniform_assignments(scores, (low + 3 * high) // 4)
    assert len({alike[name].num_bits for name in free}) == 1
    assert {wide[name].num_bits for name in vocabulary} == {16}
    (plan,) = uniform_assignments(
        scores, (low + high) // 2, Rules(floors={"*.down_proj": 8}, ceilings={"*.q_proj": 3})
    )[:1]
    assert all(f.num_bits >= 8 for name, f in plan.items() if "down_proj" in name)
    assert all(f.num_bits <= 3 for name, f in plan.items() if "q_proj" in name)


def measuring(model: Path, tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("It was a dark night, and the old man was very glad of it. " * 40)
    return ["--model", str(model), "--text", str(text), "--text-sequences", "6", "--text-sequence-length", "32"]


def test_solve_verifies_and_refine_improves(
    learned: LearnResult, tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores, manifest, better = str(learned.scores_path), tmp_path / "manifest.json", tmp_path / "better.json"
    options = measuring(tiny_model("llama"), tmp_path)
    assert main(["solve", scores, "--average-bits", "4.5", "--verify", "--out", str(manifest), *options]) == 0
    assert "uniform" in capsys.readouterr().out
    solved = Manifest.read(manifest)
    found = solved.verification
    assert found is not None
    assert found.kept == ("uniform" if found.uniform_kl < found.kl else "assignment")
    assert main(["refine", str(manifest), "--scores", scores, "--minutes", "0.2", "--out", str(better), *options]) == 0
    refined = Manifest.read(better)
    assert refined.refinement is not None
    assert refined.refinement.kl <= refined.refinement.kl_before
    assert refined.tensor_bytes <= refined.budget.nbytes


def test_a_worse_assignment_gives_way_to_the_uniform_plan(
    learned: LearnResult, tiny_model: Callable[[str], Path]
) -> None:
    """Scores turned upside down: what matters most gets least."""
    scores = learned.scores
    solved = solve_scores(scores, SolveSettings(average_bits=5.0))
    names = [name for name, module in scores.modules.items() if len(module.candidates) > 1]
    last = [name for name in names if "down_proj" in name or "v_proj" in name]
    poor = {
        name: scores.modules[name].candidates[0 if name in last else 2].format if name in names else form
        for name, form in solved.modules.items()
    }
    sizes = {name: module_bytes(form) for name, form in poor.items()}
    total = scores.other_bytes + sum(sizes.values())
    poor_manifest = solved.model_copy(update={"modules": poor, "module_bytes": sizes, "tensor_bytes": total})
    tokens = calibration_from_model(tiny_model("llama"), 8, 32, 1).token_ids
    student = Student(BlockStream(read_inventory(tiny_model("llama"))), BankReader(learned.bank_folder), tokens)
    kept = verify_against_uniform(poor_manifest, scores, student)
    assert kept.verification is not None
    assert kept.verification.kept == kept.method == "uniform"
    assert len({kept.modules[name].num_bits for name in names}) == 1
    assert kept.tensor_bytes <= kept.budget.nbytes

    # The same for a budget in bytes after loading: the uniform plan is the widest that a rank holds.
    shape = read_shape(json.loads((tiny_model("llama") / "config.json").read_text()))
    request = PlanRequest(max_model_len=64, max_num_seqs=2, kernel="torch")
    where = make_plan(shape, memory_device(8 << 30), request, weights=PlannedWeights(32)).residency
    nbytes = max(where.stage_bytes(poor))
    budget = Budget(requested="plan for a card", nbytes=nbytes + 100, kind="resident", resident_bytes=nbytes)
    poor_on_rank = poor_manifest.model_copy(update={"budget": budget})
    kept = verify_against_uniform(poor_on_rank, scores, student, residency=where)
    assert kept.verification is not None
    assert kept.verification.kept == "uniform"
    assert kept.budget.resident_bytes == max(where.stage_bytes(kept.modules)) <= nbytes + 100
    with pytest.raises(InputError, match="the plan that gave it"):
        verify_against_uniform(poor_on_rank, scores, student)
    with pytest.raises(InputError, match="solved from scores"):
        verify_against_uniform(
            poor_manifest.model_copy(update={"scores_digest": "sha256:" + 64 * "0"}), scores, student
        )
