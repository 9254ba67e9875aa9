"""The benchmark from a model folder to its result, on a tiny model: learned once, rows from exported checkpoints."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.real_models.cells import Bench
from benchmarks.real_models.figure import draw
from benchmarks.real_models.ours import Ours
from benchmarks.real_models.report import claims_of, comparisons
from benchmarks.real_models.texts import Text

MODEL = SimpleNamespace(name="tiny", title="Tiny", tied=True)


@pytest.mark.slow
def test_a_model_is_learned_once_and_its_rows_keep_their_budgets(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    bench = Bench(MODEL, tiny_model("qwen3"), tmp_path / "work", tmp_path / "none", 4, 24)  # type: ignore[arg-type]
    tokens = torch.randint(257, (8, 24), generator=torch.Generator().manual_seed(0))
    bench.__dict__["texts"] = [Text("WikiText-2", tokens[:4]), Text("chat", tokens[4:])]
    text = tmp_path / "text.txt"
    text.write_text("What is learned is learned on this, and measured on something else. " * 200)
    ours = Ours(bench, text, (4, 64))
    ours.learn()
    budgets = ours.budgets([1.0, 3.5, 4.5])
    assert budgets.pop(1.0) is None, "no assignment has 1 bit"
    for bits, budget in budgets.items():
        assert budget is not None
        row = ours.gamma(f"gamma {bits}", budget, bits=bits, widest_uniform=ours.widest_uniform(budget))
        assert budget - 2000 < row["tensor_bytes"] <= budget < row["file_bytes"] + 5000
        assert row["layers_and_head_bytes"] < row["tensor_bytes"]
        assert row["bits_per_weight"] == pytest.approx(bits, abs=0.2)
        assert row["cpu_seconds"] > 1
    ours.floor()
    ours.off_grid()
    rows = {row["row"]: row for row in bench.rows()}
    assert rows["the original in bfloat16"]["WikiText-2"]["kl"] < rows["gamma 4.5"]["WikiText-2"]["kl"]
    assert rows["gamma 4.5"]["chat"]["kl"] < rows["gamma 3.5"]["chat"]["kl"]
    assert rows["gamma 3.5"]["widest_uniform"] == "uniform 3"
    moved = rows["uniform 4, off the file's grid"]
    assert moved["tensor_bytes"] == rows["uniform 4"]["tensor_bytes"]
    assert moved["chat"]["kl"] == pytest.approx(rows["uniform 4"]["chat"]["kl"], rel=0.5), "random weights have no grid"
    compared = comparisons(bench)
    assert {(c["row"], c["against"]) for c in compared} == {("gamma 3.5", "uniform 3"), ("gamma 4.5", "uniform 4")}
    assert claims_of(list(rows.values()), compared)[0]["holds"]
    draw(list(rows.values()), "Tiny", tmp_path / "figure")
    assert (tmp_path / "figure.svg").stat().st_size > 1000
    assert (tmp_path / "figure.png").stat().st_size > 1000
