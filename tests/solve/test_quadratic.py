"""Scores with interactions: what the descent finds, what its bound says, and what a file of them must hold."""

import base64
import itertools

import numpy as np
import pytest

from allocator.contract.errors import ContractError
from allocator.contract.layout import ModuleFormat, module_bytes
from allocator.contract.scores import Candidate, Interactions, ScoredModule, Scores
from allocator.solve import solve
from allocator.solve.many_budgets import uniform_plans
from allocator.solve.predicted import predicted_loss
from allocator.solve.quadratic import interactions_among, pair_terms, quadratic_of
from allocator.solve.units import NO_RULES, Rules, units_of

WIDTHS = (2, 4, 8)


def make_scores(modules: int, seed: int, strength: float = 0.5) -> Scores:
    """Scores of errors drawn at random, correlated across modules by a common part."""
    chance = np.random.default_rng(seed)
    common = chance.normal(size=200)
    errors, table = [], {}
    for m in range(modules):
        size = chance.lognormal(sigma=0.7)
        candidates = []
        for bits in WIDTHS:
            error = (chance.normal(size=200) + strength * chance.normal() * common) * size * 2.0**-bits
            errors.append(error)
            form = ModuleFormat(shape=(64, 32 * (1 + m % 3)), num_bits=bits, group_size=32, symmetric=False)
            candidates.append(Candidate(format=form, nbytes=module_bytes(form), score=float(error @ error) / 400))
        form = ModuleFormat(shape=(64, 32 * (1 + m % 3)), num_bits=16)
        candidates.append(Candidate(format=form, nbytes=module_bytes(form), score=0.0))
        table[f"m{m:02d}"] = ScoredModule(candidates=candidates, fused_group=f"g{m // 2}")
    z = np.array(errors) / np.linalg.norm(errors, axis=1, keepdims=True)
    stored = (z @ z.T).astype(np.float16)
    upper = stored[np.triu_indices(len(z), 1)]
    between = stored.astype(np.float64) * (np.arange(len(z))[:, None] // 3 != np.arange(len(z))[None, :] // 3)
    least = float(np.linalg.eigvalsh(between + np.eye(len(z)))[0])
    digest = "sha256:" + 64 * "0"
    return Scores.model_validate(
        {
            "model": {"name": "m", "architecture": "a", "digest": digest}, "bank_digest": digest, "dtype": "BF16",
            "method": "gamma", "unit": "nats", "settings": {}, "other_bytes": 0, "modules": table,
            "interactions": Interactions(
                correlations=base64.b64encode(upper.astype("<f2").tobytes()).decode(), least_eigenvalue=least
            ),
        }
    )  # fmt: skip


def brute_force(scores: Scores, budget: int) -> float:
    """Least loss of all assignments within the budget, from the definition."""
    terms = pair_terms(scores)
    number = {(name, c.format.num_bits): i for i, (name, c) in enumerate(scores.interacting())}
    best = np.inf
    for choice in itertools.product(*(m.candidates for m in scores.modules.values())):
        if sum(c.nbytes for c in choice) <= budget:
            keys = zip(scores.modules, choice, strict=True)
            at = [number[n, c.format.num_bits] for n, c in keys if c.format.quantized]
            best = min(best, sum(c.score for c in choice) + terms[np.ix_(at, at)].sum())
    return float(best)


@pytest.mark.parametrize("seed", range(6))
def test_descent_finds_the_best_or_nearly(seed: int) -> None:
    scores = make_scores(5, seed)
    low, high = scores.feasible_bytes()
    for share in (0.1, 0.3, 0.6):
        budget = int(low + share * (high - low))
        solution = solve(scores, budget)
        truth = brute_force(scores, budget)
        assert solution.tensor_bytes <= budget
        assert truth - 1e-12 <= solution.objective <= 1.02 * truth
        assert solution.bound <= truth + 1e-12
        assert solution.gap == pytest.approx(solution.objective - solution.bound)
        assert not solution.cut  # what is left is the bound's


def test_descent_never_loses_against_scores_alone() -> None:
    for seed in range(5):
        scores = make_scores(12, seed)
        low, high = scores.feasible_bytes()
        budget = (3 * low + high) // 4
        alone = solve(scores.model_copy(update={"interactions": None}), budget)
        program = quadratic_of(scores, units_of(scores, NO_RULES, "free"))
        position = [4 * m + [*WIDTHS, 16].index(f.num_bits) for m, f in enumerate(alone.assignment.values())]
        assert solve(scores, budget).objective <= program.value(np.array(position)) + 1e-12


def test_rules_and_tied_groups_are_kept() -> None:
    scores = make_scores(8, 1)
    low, high = scores.feasible_bytes()
    solution = solve(scores, (low + high) // 2, Rules({"m00": 2}, floors={"m03": 4}), fusion="tied")
    bits = {name: form.num_bits for name, form in solution.assignment.items()}
    assert bits["m00"] == bits["m01"] == 2
    assert bits["m03"] == bits["m02"] >= 4


def test_without_correlation_the_answer_is_that_of_the_scores() -> None:
    scores = make_scores(6, 2)
    assert scores.interactions is not None
    nothing = base64.b64encode(bytes(len(scores.interactions.content()))).decode()
    flat = scores.model_copy(update={"interactions": Interactions(correlations=nothing, least_eigenvalue=1.0)})
    low, high = scores.feasible_bytes()
    solution = solve(flat, (low + high) // 2)
    assert solution.assignment == solve(scores.model_copy(update={"interactions": None}), (low + high) // 2).assignment
    assert solution.gap == pytest.approx(0, abs=1e-12)


def test_a_part_of_the_modules_keeps_its_pairs() -> None:
    scores = make_scores(4, 3)
    names = ["m01", "m03"]
    part = scores.model_copy(
        update={
            "modules": {name: scores.modules[name] for name in names},
            "interactions": interactions_among(scores, names),
        }
    )
    at = [i for i, (name, _) in enumerate(scores.interacting()) if name in names]
    np.testing.assert_allclose(pair_terms(part), pair_terms(scores)[np.ix_(at, at)])


def test_a_file_with_too_few_numbers_is_refused(tmp_path) -> None:
    scores = make_scores(3, 0)
    assert scores.interactions is not None
    cut = base64.b64encode(scores.interactions.content()[:-2]).decode()
    path = tmp_path / "scores.json"
    scores.model_copy(update={"interactions": Interactions(correlations=cut, least_eigenvalue=1.0)}).write(path)
    with pytest.raises(ContractError, match=r"interactions have 70 bytes, 9 candidates below 16 bits have 72"):
        Scores.read(path)
    broken = Interactions(correlations="###", least_eigenvalue=1.0)
    scores.model_copy(update={"interactions": broken}).write(path)
    with pytest.raises(ContractError, match="not base64"):
        Scores.read(path)


@pytest.mark.parametrize("seed", range(3))
def test_the_predicted_loss_of_an_assignment_is_what_the_solver_minimises(seed: int) -> None:
    scores = make_scores(6, seed)
    low, high = scores.feasible_bytes()
    for share in (0.1, 0.5, 1.0):
        solution = solve(scores, int(low + share * (high - low)))
        assert predicted_loss(scores, solution.assignment) == pytest.approx(solution.objective, rel=1e-9, abs=1e-15)
    for plan in uniform_plans(scores):
        assert solve(scores, plan.tensor_bytes).objective <= plan.objective + 1e-12
    with pytest.raises(ContractError, match=r"m00: the scores .* have no candidate of 5 bits"):
        predicted_loss(scores, {"m00": ModuleFormat(shape=(64, 32), num_bits=5, group_size=32, symmetric=False)})
