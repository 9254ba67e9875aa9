"""How fast the integer program is solved: programs of the shapes of Qwen3-32B and Qwen3-30B-A3B, several score
distributions, several draws of each.

    make bench-solver

Scores are drawn, not learned: a module's sensitivity is log-normal or has a heavier tail, its error falls by about a
factor of four with each bit, and each candidate has noise of its own. Seconds are of the process's CPU, which another
program on the machine does not change; wall-clock seconds stand beside them. Writes benchmarks/results/solver.json.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from allocator.solve import Program, SearchLimits, budget_for_average_bits, solve  # noqa: E402
from allocator.solve.dynamic import MOST_STATES  # noqa: E402
from allocator.solve.many_budgets import solve_budgets, spread_budgets  # noqa: E402
from allocator.solve.units import NO_RULES  # noqa: E402
from benchmarks.record import claim, write_result  # noqa: E402
from tests.drawn_scores import SENSITIVITIES, Shapes, draw_scores, qwen3_30b_a3b, qwen3_32b  # noqa: E402

SEEDS = [0, 1, 2]
BITS = [2.3, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0, 4.5, 6.0]
SWEEP = ("2.3bits", "4.5bits", 100)


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, CPU seconds of the process, wall-clock seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def single_rows(model: str, shapes: Callable[[], Shapes], noise: float, bits: list[float]) -> list[dict[str, Any]]:
    """One row a distribution: all draws and budgets of it, each solved anew from the scores."""
    rows = []
    for name, sensitivity in SENSITIVITIES.items():
        cpu, wall, gaps = [], [], []
        for seed in SEEDS:
            scores = draw_scores(shapes(), sensitivity, seed, noise)
            for average in bits:
                budget = budget_for_average_bits(scores, average)
                found, cpu_seconds, wall_seconds = timed(lambda s=scores, b=budget: solve(s, b))
                assert found.tensor_bytes <= budget
                cpu.append(cpu_seconds)
                wall.append(wall_seconds)
                gaps.append(found.gap / found.objective if found.objective else 0.0)
        rows.append({
            "what": "single budgets", "model": model, "modules": len(scores.modules), "sensitivity": name,
            "solves": len(cpu), "cpu_seconds_max": max(cpu), "cpu_seconds_mean": sum(cpu) / len(cpu),
            "wall_seconds_max": max(wall), "relative_gap_max": max(gaps), "proven": sum(gap == 0 for gap in gaps),
        })  # fmt: skip
        print(f"{model}, {name}: {len(cpu)} solves, at most {max(cpu):.2f} s, relative gap {max(gaps):.1e}", flush=True)
    return rows


def sweep_rows(model: str, shapes: Callable[[], Shapes], noise: float) -> list[dict[str, Any]]:
    """One row a distribution: a sweep of 100 budgets from the scores on."""
    rows = []
    for name, sensitivity in SENSITIVITIES.items():
        cpu, wall, gaps = [], [], []
        for seed in SEEDS:
            scores = draw_scores(shapes(), sensitivity, seed, noise)
            budgets = spread_budgets(scores, *SWEEP)
            points, cpu_seconds, wall_seconds = timed(
                lambda s=scores, b=budgets: solve_budgets(Program.of(s, NO_RULES), b)
            )
            cpu.append(cpu_seconds)
            wall.append(wall_seconds)
            gaps.append(max(p.solution.gap / p.solution.objective for p in points))
        rows.append({
            "what": "sweep of 100 budgets", "model": model, "modules": len(scores.modules), "sensitivity": name,
            "sweeps": len(cpu), "cpu_seconds_max": max(cpu), "cpu_seconds_mean": sum(cpu) / len(cpu),
            "wall_seconds_max": max(wall), "relative_gap_max": max(gaps),
        })  # fmt: skip
        print(f"{model}, {name}: sweeps of 100, at most {max(cpu):.2f} s", flush=True)
    return rows


def other_rows() -> list[dict[str, Any]]:
    """HiGHS on the same programs, for comparison: a draw of each model, one budget."""
    rows = []
    for model, shapes in (("Qwen3-32B", qwen3_32b), ("Qwen3-30B-A3B", qwen3_30b_a3b)):
        scores = draw_scores(shapes(), SENSITIVITIES["log-normal, sigma 2"], SEEDS[0], 0.3)
        budget = budget_for_average_bits(scores, 2.5)
        for name, states in (("dynamic", MOST_STATES), ("highs", 0)):
            found, cpu, wall = timed(
                lambda s=scores, b=budget, n=states: solve(s, b, limits=SearchLimits(most_states=n))
            )
            rows.append({
                "what": "one budget", "model": model, "modules": len(scores.modules), "solver": name,
                "average_bits": 2.5, "cpu_seconds": cpu, "wall_seconds": wall, "objective": found.objective,
                "relative_gap": found.gap / found.objective,
            })  # fmt: skip
            print(f"{model}, {name}: {cpu:.2f} s, objective {found.objective:.6g}, gap {found.gap:.1e}", flush=True)
    return rows


def main() -> None:
    dense = single_rows("Qwen3-32B", qwen3_32b, 0.3, BITS)
    sweeps = sweep_rows("Qwen3-32B", qwen3_32b, 0.3)
    experts = single_rows("Qwen3-30B-A3B", qwen3_30b_a3b, 0.3, [2.5, 3.0, 4.0])
    others = other_rows()
    slowest = {kind: max(r["cpu_seconds_max"] for r in rows) for kind, rows in
               (("dense", dense), ("sweep", sweeps), ("experts", experts))}  # fmt: skip
    unproven = sum(r["solves"] - r["proven"] for r in dense)
    gap = max(r["relative_gap_max"] for r in experts)
    claims = [
        claim("Qwen3-32B, 450 modules, widths 2-8 and 16: CPU seconds of the slowest solve", slowest["dense"], "< 1",
              slowest["dense"] < 1),
        claim("Qwen3-32B: solves that are not proven best", unproven, "0", unproven == 0),
        claim("Qwen3-32B: CPU seconds of the slowest sweep of 100 budgets", slowest["sweep"], "< 10",
              slowest["sweep"] < 10),
        claim("Qwen3-30B-A3B, a choice for every expert matrix: CPU seconds of the slowest solve", slowest["experts"],
              "< 15", slowest["experts"] < 15),
        claim("Qwen3-30B-A3B: largest relative gap", gap, "< 1e-4", gap < 1e-4),
    ]  # fmt: skip
    for entry in claims:
        print(f"{'holds' if entry['holds'] else 'FAILS'}: {entry['claim']}: {entry['value']:.3g} ({entry['limit']})")
    path = write_result("solver", "make bench-solver", SEEDS, [*dense, *sweeps, *experts, *others], claims)
    print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
