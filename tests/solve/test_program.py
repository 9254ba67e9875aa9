"""The assignment is the best there is, never a byte over the budget, and the same every time."""

import ctypes
import itertools
import math
import os
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allocator.contract.errors import InfeasibleBudgetError, InputError
from allocator.contract.layout import WIDTHS, module_bytes
from allocator.contract.manifest import Manifest
from allocator.solve import Rules, SearchLimits, make_manifest, solve
from allocator.solve.dynamic import MOST_STATES
from allocator.solve.mathopt import stdout_to_stderr

STATES = pytest.mark.parametrize("most_states", [MOST_STATES, 0], ids=["dynamic", "highs"])
"""By the dynamic program, and by HiGHS, which has what the dynamic program cannot do."""
no_deadline = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

numbers = st.one_of(
    st.floats(0, 1, allow_subnormal=False),
    st.integers(0, 3).map(float),
    st.floats(-1e3, 1e3, allow_subnormal=False),
)


@st.composite
def instances(draw):
    """Small scores with their scale, fused groups, rules and a budget anywhere in or around the feasible range."""
    scale = draw(st.sampled_from([1.0, 1e-9, 1e6]))
    modules, groups = {}, {}
    for i in range(draw(st.integers(1, 5))):
        shape = (draw(st.integers(1, 40)), 32 * draw(st.integers(1, 3)))
        widths = draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=4, unique=True))
        modules[f"m{i}"] = (shape, {b: scale * draw(numbers) for b in widths})
        group = draw(st.sampled_from([None, "g"]))
        if group is not None:
            groups[f"m{i}"] = group
    rules = {
        kind: draw(st.dictionaries(st.sampled_from(["*", "m0", "m[12]"]), st.sampled_from(WIDTHS), max_size=1))
        for kind in ("pins", "ceilings", "floors")
    }
    rules = draw(st.sampled_from([{}, {}, rules]))
    return modules, groups, rules, draw(st.sampled_from(["free", "tied"])), draw(st.floats(0, 1.1)), draw(st.booleans())


def allowed(scores, rules):
    """The rules in the plainest words: widths left to each module, None if a rule counts for no module."""
    left = {name: {c.format.num_bits: c for c in m.candidates} for name, m in scores.modules.items()}
    choosable = [name for name, widths in left.items() if len(widths) > 1]
    tests = {"pins": lambda w, b: w == b, "ceilings": lambda w, b: w <= b, "floors": lambda w, b: w >= b}
    for kind, patterns in rules.items():
        for pattern, bits in patterns.items():
            matching = [name for name in choosable if fnmatchcase(name, pattern)]
            if not matching:
                return None
            for name in matching:
                left[name] = {w: c for w, c in left[name].items() if tests[kind](w, bits)}
    return left


def brute_force(scores, rules, fusion):
    """Every assignment as (bytes, score), or None when the rules cannot be kept."""
    left = allowed(scores, rules)
    if left is None or not all(left.values()):
        return None
    combinations = []
    for choice in itertools.product(*(widths.values() for widths in left.values())):
        by_group = {}
        for name, candidate in zip(left, choice, strict=True):
            group = scores.modules[name].fused_group or name
            by_group.setdefault(group, set()).add(candidate.format.num_bits)
        if fusion == "free" or all(len(widths) == 1 for widths in by_group.values()):
            nbytes = scores.other_bytes + sum(c.nbytes for c in choice)
            combinations.append((nbytes, math.fsum(c.score for c in choice)))
    return combinations or None


@STATES
@no_deadline
@given(instances())
def test_answer_equals_brute_force(make_scores, most_states, instance):
    modules, groups, rules, fusion, position, exact = instance
    scores = make_scores(modules, 100, groups)
    everything = brute_force(scores, rules, fusion)
    arguments = {"rules": Rules(**rules), "fusion": fusion, "limits": SearchLimits(most_states=most_states)}
    if everything is None:
        with pytest.raises(InputError):
            solve(scores, 10**9, **arguments)
        return
    sizes = sorted(nbytes for nbytes, _ in everything)
    budget = int(sizes[0] + position * (sizes[-1] - sizes[0]))
    if exact:  # a budget that one assignment fills to the byte
        budget = next(size for size in [*sizes, sizes[-1]] if size >= min(budget, sizes[-1]))
    best = min(score for nbytes, score in everything if nbytes <= budget)
    span = sum(max(s.values()) - min(s.values()) for _, s in modules.values())

    solution = solve(scores, budget, **arguments)
    nbytes = scores.other_bytes + sum(module_bytes(f) for f in solution.assignment.values())
    assert nbytes == solution.tensor_bytes <= budget
    assert list(solution.assignment) == list(scores.modules)
    assert solution.objective == pytest.approx(best, rel=1e-12, abs=2e-9 * span + 1e-300)
    assert solution.bound <= solution.objective
    assert solution.gap == 0
    with pytest.raises(InfeasibleBudgetError, match=f"feasible are {sizes[0]} to {sizes[-1]} bytes"):
        solve(scores, sizes[0] - 1, **arguments)


def test_450_modules_at_7_widths_are_proven_best_at_20_budgets(make_large):
    scores = make_large(450)
    smallest, largest = scores.feasible_bytes()
    found = [solve(scores, smallest + (largest - smallest) * i // 21) for i in range(1, 21)]
    assert [(s.gap, s.solver) for s in found] == [(0.0, "dynamic")] * 20
    assert all(a.objective > b.objective for a, b in itertools.pairwise(found))


def test_both_solvers_agree_on_a_large_program(make_large):
    """With more states than the dynamic program may look at, HiGHS goes on."""
    scores = make_large(450, seed=1)
    budget = sum(scores.feasible_bytes()) // 4
    best, other = solve(scores, budget), solve(scores, budget, limits=SearchLimits(most_states=0))
    assert (best.solver, other.solver) == ("dynamic", "dynamic, highs")
    assert (best.gap, other.gap) == (0.0, 0.0)
    assert other.objective == pytest.approx(best.objective, rel=1e-9)


def test_differences_below_the_resolution_of_floats_are_no_error(make_scores):
    scores = make_scores({"a": ((1, 32), {2: 1.0, 3: 2.2e-299, 4: 0.0}), "b": ((1, 32), {2: 1e-320, 4: 0.0})})
    smallest, largest = scores.feasible_bytes()
    for budget in range(smallest, largest + 1):
        assert solve(scores, budget).tensor_bytes <= budget


@STATES
@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_unit_of_the_scores_does_not_change_the_answer(make_large, most_states, scale):
    plain, scaled = make_large(60), make_large(60, scale)
    smallest, largest = plain.feasible_bytes()
    budget = (smallest + largest) // 3
    one, other = (
        solve(plain, budget, limits=SearchLimits(most_states=most_states)),
        solve(scaled, budget, limits=SearchLimits(most_states=most_states)),
    )
    assert other.gap == 0
    assert other.objective == pytest.approx(one.objective * scale, rel=1e-7)


@STATES
def test_budget_of_exactly_one_assignment_is_filled_and_one_byte_less_is_not(make_large, most_states):
    scores = make_large(40)
    smallest, largest = scores.feasible_bytes()
    best = solve(scores, (smallest + largest) // 2, limits=SearchLimits(most_states=most_states))
    again = solve(scores, best.tensor_bytes, limits=SearchLimits(most_states=most_states))
    assert again.assignment == best.assignment
    less = solve(scores, best.tensor_bytes - 1, limits=SearchLimits(most_states=most_states))
    assert less.tensor_bytes < best.tensor_bytes
    assert less.objective > best.objective


@STATES
def test_same_input_same_answer_and_the_order_of_modules_does_not_count(make_large, most_states):
    scores = make_large(80)
    budget = sum(scores.feasible_bytes()) // 3
    shuffled = scores.model_copy(update={"modules": dict(sorted(scores.modules.items(), reverse=True))})
    first, second, third = (
        solve(s, budget, limits=SearchLimits(most_states=most_states)) for s in (scores, scores, shuffled)
    )
    assert first == second
    assert third.assignment == first.assignment
    assert list(third.assignment) == list(shuffled.modules)


def test_memory_that_is_not_needed_is_not_spent(make_scores):
    """The widest candidate is not always the best, and of equally good ones the smallest is taken."""
    scores = make_scores({"a": ((8, 32), {2: 3.0, 4: 1.0, 8: 1.0, 16: 2.0})})
    solution = solve(scores, 10**9)
    assert solution.assignment["a"].num_bits == 4
    assert (solution.objective, solution.bound, solution.gap) == (1.0, 1.0, 0.0)


def test_tied_groups_share_a_width_and_free_ones_need_not(make_scores):
    modules = {
        "q": ((32, 64), {2: 9.0, 4: 0.0}),
        "k": ((32, 64), {2: 1.0, 4: 0.0}),
        "o": ((32, 64), {2: 2.0, 4: 0.0}),
    }
    scores = make_scores(modules, 0, {"q": "qkv", "k": "qkv"})
    budget = scores.feasible_bytes()[0] + 2 * 32 * 64 * 2 // 8
    free, tied = solve(scores, budget), solve(scores, budget, fusion="tied")
    assert {n: f.num_bits for n, f in free.assignment.items()} == {"q": 4, "k": 2, "o": 4}
    assert {n: f.num_bits for n, f in tied.assignment.items()} == {"q": 4, "k": 4, "o": 2}


def test_rules_are_kept_and_do_not_count_for_modules_without_a_choice(make_scores):
    modules = {f"layers.{i}.q": ((32, 64), {2: 1.0, 4: 0.5, 8: 0.0}) for i in range(3)}
    scores = make_scores(modules | {"lm_head": ((32, 64), {16: 0.0})})
    solution = solve(scores, 10**9, Rules({"layers.0.*": 2}, ceilings={"*": 4}, floors={"layers.2.q": 4}))
    assert {n: f.num_bits for n, f in solution.assignment.items()} == {
        "layers.0.q": 2,
        "layers.1.q": 4,
        "layers.2.q": 4,
        "lm_head": 16,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rules": Rules({"nothing.*": 4})}, r"pin nothing\.\*=4 matches no module; a module is named like a\.q"),
        ({"rules": Rules({"lm_head": 4})}, "pin lm_head=4 matches only modules without a choice: lm_head has 16 bits"),
        ({"rules": Rules({"a.q": 3})}, r"a\.q: pin a\.q=3 leave no width; it has \[2, 4\]"),
        ({"rules": Rules({"a.q": 4}, ceilings={"*": 2})}, r"a\.q: pin a\.q=4, ceiling \*=2 leave no width"),
        ({"fusion": "tied", "rules": Rules({"a.q": 2, "a.k": 4})}, r"no common width: a\.k \[4\]; a\.q \[2\]"),
        ({"fusion": "loose"}, "fusion 'loose' is not known; known are free, tied"),
    ],
)
def test_rules_that_cannot_be_kept_are_refused(make_scores, arguments, message):
    both = ((32, 64), {2: 1.0, 4: 0.0})
    scores = make_scores(
        {"a.q": both, "a.k": both, "lm_head": ((32, 64), {16: 0.0})}, 0, {"a.q": "a.qkv", "a.k": "a.qkv"}
    )
    with pytest.raises(InputError, match=message):
        solve(scores, 10**9, **arguments)


def test_infeasible_budget_names_the_range_and_what_to_do(make_large):
    scores = make_large(450)
    smallest, largest = scores.feasible_bytes()
    with pytest.raises(InfeasibleBudgetError) as refusal:
        solve(scores, smallest - 1)
    message = str(refusal.value)
    for part in (smallest - 1, smallest, largest, f"{smallest / 2**30:.2f} to {largest / 2**30:.2f} GiB"):
        assert str(part) in message
    assert "Raise the budget to at least" in message
    assert solve(scores, smallest).tensor_bytes == smallest


@STATES
def test_search_cut_by_the_time_limit_still_fits_and_tells_its_gap(make_large, most_states):
    scores = make_large(2000)
    budget = sum(scores.feasible_bytes()) // 3
    solution = solve(scores, budget, limits=SearchLimits(time_limit_seconds=1e-6, most_states=most_states))
    assert solution.tensor_bytes <= budget
    assert solution.gap >= 0
    assert solution.cut == (solution.gap > 0)
    assert make_manifest(scores, solution, "x", budget).proof.cut == (True if solution.cut else None)
    assert solution.bound <= solve(scores, budget).objective * (1 + 1e-9) <= solution.objective * (1 + 2e-9)


def test_solution_becomes_a_manifest_that_is_read_again(make_large, tmp_path):
    scores = make_large(30)
    budget = sum(scores.feasible_bytes()) // 3
    solution = solve(scores, budget)
    manifest = make_manifest(scores, solution, "a third", budget)
    manifest.write(tmp_path / "manifest.json")
    again = Manifest.read(tmp_path / "manifest.json")
    assert again.modules == solution.assignment
    assert again.tensor_bytes == solution.tensor_bytes
    assert (again.scores_digest, again.bank_digest) == (scores.digest, scores.bank_digest)
    assert again.budget.requested == "a third"
    assert again.proof is not None
    assert again.proof.gap == 0


def test_what_a_native_library_prints_does_not_reach_stdout(capfd):
    """HiGHS prints debugging lines on some programs; stdout belongs to the table or the JSON of the command."""
    os.write(1, b"before\n")
    with stdout_to_stderr():
        ctypes.CDLL(None).puts(b"HighsMipSolverData")
    os.write(1, b"after\n")
    captured = capfd.readouterr()
    assert captured.out == "before\nafter\n"
    assert captured.err == "HighsMipSolverData\n"


def test_solving_imports_no_torch():
    code = "import sys, allocator.solve; print('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.strip() == "False"
