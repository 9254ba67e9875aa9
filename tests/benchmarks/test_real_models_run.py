"""The benchmark from a model folder to its result, on a tiny model: learned once, rows from exported checkpoints."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from allocator.contract.errors import InputError
from benchmarks.real_models import bench as benchmark
from benchmarks.real_models.cells import Bench
from benchmarks.real_models.figure import draw
from benchmarks.real_models.ours import GPTQ, Candidates, Ours
from benchmarks.real_models.report import claims_of, comparisons
from benchmarks.real_models.texts import Text

MODEL = SimpleNamespace(name="tiny", title="Tiny", tied=True)


def rows_of(bench: Bench) -> dict[str, dict[str, Any]]:
    return {row["row"]: row for row in bench.rows()}


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
    pinned = ours.budgets([3.5], pinned=True)[3.5]
    assert pinned is not None
    beside = ours.gamma_beside_8_bits(3.5, pinned)
    assert beside["tensor_bytes"] > rows_of(bench)["gamma 3.5"]["tensor_bytes"], "the vocabulary is wider"
    assert pinned - 2000 < beside["tensor_bytes"] <= pinned
    tune_with = ["--sequences", "4", "--sequence-length", "48", "--scale-steps", "0"]
    tune_with += ["--quantizer", "learned-rounding:iterations=2,draws=1"]
    kind = Candidates("tuned", "gptq", GPTQ.folder, ", tuned", tuned=True)
    budget = ours.budgets([3.5])[3.5]
    assert budget is not None
    tuned = Ours(bench, text, (4, 64), kind, tune_with).gamma("gamma 3.5", budget, bits=3.5)
    assert tuned["row"] == "gamma 3.5, tuned"
    assert tuned["tensor_bytes"] == rows_of(bench)["gamma 3.5"]["tensor_bytes"], "tuning keeps the bytes"
    assert tuned["tuning"]["tokens"] == 4 * 48
    assert tuned["cpu_seconds"] > tuned["tuning_cpu_seconds"] > 1
    assert not (bench.work / "tuned" / "gamma_3.5,_tuned").exists(), "its bank is not left behind"
    ours.floor()
    ours.off_grid()
    scores = ours.scores
    ours.record.unlink()
    found = Ours(bench, text, (9, 32))
    found.learn()
    assert found.scores == scores, "what another command has learned is used as it is"
    assert found.learned_on == (4, 64)
    others = Candidates("others", "rtn", GPTQ.folder, "")
    with pytest.raises(InputError, match="holds candidates by gptq"):
        Ours(bench, text, (4, 64), others).learn()
    assert ours.scores == scores
    rows = rows_of(bench)
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


def test_a_rival_that_cannot_be_had_leaves_out_its_rows_and_no_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []

    def absent(*_: Any) -> None:
        raise InputError("its library needs glibc 2.38")

    programs = {"llama.cpp": absent, "autoround": lambda *_: made.append("autoround")}
    monkeypatch.setattr(benchmark, "PROGRAMS", programs)
    ours = SimpleNamespace(learn=made.append, floor=lambda: made.append("floor"))
    args = Namespace(bank_only=True, rivals=list(programs))
    bench = SimpleNamespace(model=MODEL, may_want=lambda _: True)
    benchmark.run(bench, [ours], args)  # type: ignore[arg-type, list-item]
    assert made == ["uniform", "floor", "autoround"]
    made.clear()
    bench.may_want = lambda _: False
    benchmark.run(bench, [ours], args)  # type: ignore[arg-type, list-item]
    assert made == ["floor", "autoround"], "nothing is learned where only rows of others are wanted"
    assert "tiny: rows of llama.cpp are left out: its library needs glibc 2.38" in capsys.readouterr().out
