"""A sweep is what single solves are, beside the uniform plans; a relative gap is kept."""

import csv
import io
import itertools
import json
import subprocess
import sys

import pytest

from allocator.contract.errors import InfeasibleBudgetError, InputError
from allocator.contract.layout import module_bytes
from allocator.solve import Program, SearchLimits, budget_for_average_bits, solve
from allocator.solve.many_budgets import best_uniform, solve_budgets, spread_budgets, uniform_plans
from allocator.solve.request import average_bits_of, parse_amount
from allocator.solve.units import NO_RULES, Rules


def test_a_sweep_gives_what_single_solves_give(make_large):
    scores = make_large(60)
    budgets = spread_budgets(scores, "2.6bits", "6 bits", 9)
    assert budgets[0] == budget_for_average_bits(scores, 2.6)
    assert budgets[-1] == budget_for_average_bits(scores, 6.0)
    points = solve_budgets(Program.of(scores, NO_RULES), budgets)
    for budget, point in zip(budgets, points, strict=True):
        alone = solve(scores, budget)
        assert point.solution == alone
        assert point.average_bits == average_bits_of(scores, alone.tensor_bytes)
    losses = [point.solution.objective for point in points]
    assert losses == sorted(losses, reverse=True)


def test_a_uniform_plan_has_one_width_and_is_never_better_than_the_best(make_large):
    scores = make_large(40)
    for plan in uniform_plans(scores):
        assert {f.num_bits for f in plan.assignment.values()} == {plan.num_bits}
        assert plan.tensor_bytes == scores.other_bytes + sum(map(module_bytes, plan.assignment.values()))
        best = solve(scores, plan.tensor_bytes)
        assert best.objective <= plan.objective
        assert best_uniform(uniform_plans(scores), plan.tensor_bytes).num_bits == plan.num_bits
    assert best_uniform(uniform_plans(scores), 1) is None


def test_a_module_without_the_width_takes_its_next_wider(make_scores):
    scores = make_scores(
        {"a": ((4, 32), {2: 4.0, 3: 3.0, 16: 0.0}), "b": ((4, 32), {2: 1.0, 4: 0.5}), "c": ((4, 32), {16: 0.0})}
    )
    plan = next(p for p in uniform_plans(scores) if p.num_bits == 3)
    assert {n: f.num_bits for n, f in plan.assignment.items()} == {"a": 3, "b": 4, "c": 16}
    assert plan.objective == 3.5


@pytest.mark.parametrize("gap", [1e-2, 1e-4])
def test_a_relative_gap_is_proven_and_kept(make_large, gap):
    scores = make_large(200, seed=3)
    smallest, largest = scores.feasible_bytes()
    for share in (0.02, 0.1, 0.3):
        budget = int(smallest + share * (largest - smallest))
        near, best = solve(scores, budget, limits=SearchLimits(relative_gap=gap)), solve(scores, budget)
        assert near.gap <= gap * near.objective
        assert near.bound <= best.objective <= near.objective <= best.objective * (1 + gap) / (1 - gap)


def test_thousands_of_units_are_solved_to_the_proven_best(make_large):
    """As many choices as a model of experts has, and a bound that is the relaxation's own: within rounding of it."""
    scores = make_large(6000, seed=2)
    program = Program.of(scores, NO_RULES)
    smallest, largest = scores.feasible_bytes()
    for share in (0.05, 0.2):
        budget = int(smallest + share * (largest - smallest))
        best = program.solve(budget)
        assert (best.gap, best.solver) == (0.0, "dynamic")
        assert best.tensor_bytes <= budget
        near = program.solve(budget, SearchLimits(relative_gap=1e-4))
        assert near.bound <= best.objective <= near.objective


def test_rules_and_fusion_hold_in_a_program(make_scores):
    scores = make_scores({name: ((8, 32), {2: 1.0, 4: 0.2, 8: 0.1}) for name in "abc"}, groups={"a": "g", "b": "g"})
    program = Program.of(scores, Rules({"c": 8}, {}, {}), "tied")
    for budget in range(program.smallest_bytes, program.largest_bytes + 1, 50):
        widths = {n: f.num_bits for n, f in program.solve(budget).assignment.items()}
        assert widths["c"] == 8
        assert widths["a"] == widths["b"]
    with pytest.raises(InfeasibleBudgetError):
        program.solve(program.smallest_bytes - 1)


@pytest.mark.parametrize(
    ("lowest", "highest", "points", "message"),
    [("4bits", "3bits", 5, "swap"), ("3bits", "4bits", 1, "--points 1"), ("3apples", "4bits", 5, "apples")],
)
def test_a_range_that_makes_no_sense_is_refused(make_large, lowest, highest, points, message):
    with pytest.raises(InputError, match=message):
        spread_budgets(make_large(5), lowest, highest, points)


def test_amounts_are_bits_or_memory(make_large):
    scores = make_large(5)
    assert parse_amount("3.5bits", scores) == parse_amount("3.5 bits", scores) == budget_for_average_bits(scores, 3.5)
    assert parse_amount("2MiB", scores) == 2 << 20


def test_the_verb_prints_table_csv_and_json_and_draws(make_large, tmp_path):
    scores = make_large(30)
    scores.write(tmp_path / "scores.json")

    def gamma(*arguments):
        command = [sys.executable, "-m", "allocator.cli.main", "sweep", tmp_path / "scores.json", *arguments]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    budgets = ["--from", "2.6bits", "--to", "4.5bits", "--points", "5"]
    figures = [f"--figure={tmp_path / name}" for name in ("s.png", "s.svg")]
    rows = list(csv.DictReader(io.StringIO(gamma(*budgets, "--csv", *figures))))
    document = json.loads(gamma(*budgets, "--json"))
    assert [int(r["tensor_bytes"]) for r in rows] == [r["tensor_bytes"] for r in document["rows"]]
    assert all(int(r["tensor_bytes"]) <= int(r["budget_bytes"]) for r in rows)
    assert all(float(r["predicted_loss"]) <= float(r["uniform_predicted_loss"]) for r in rows)
    assert all(float(a["predicted_loss"]) >= float(b["predicted_loss"]) for a, b in itertools.pairwise(rows))
    table = gamma(*budgets)
    assert max(map(len, table.splitlines())) <= 80
    assert "3 bits" in table
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert "average bits" in (tmp_path / "s.svg").read_text()
