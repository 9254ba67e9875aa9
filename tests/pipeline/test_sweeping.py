"""`gamma sweep --gpus`: what fits on each card is the same as planning and solving for it, and prices add up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from allocator.contract.scores import Scores
from allocator.plan import PlanRequest, find_gpu, make_plan
from allocator.plan.weights import read_model
from allocator.solve import SolveSettings, solve_resident
from tests.drawn_scores import SENSITIVITIES, draw_scores, qwen3_32b

CONFIG = Path(__file__).parents[1] / "fixtures" / "configs" / "qwen3-32b.json"
TRAFFIC = ["--max-model-len", "8192", "--kv-cache-dtype", "fp8"]


def gamma(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "allocator.cli.main", "sweep", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def scores_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    draw_scores(qwen3_32b(), SENSITIVITIES["log-normal, sigma 1"], 0, 0.3).write(path)
    return path


def test_a_card_gets_the_assignment_of_its_plan(scores_file, tmp_path):
    figure = tmp_path / "gpus.svg"
    prices = ["--price", "l4=0.5", "--price", "l40s=1.5"]
    options = ["--gpus", "l40s,l4,t4,rtx4060", "--model", CONFIG, *TRAFFIC, "--points", "4", *prices]
    document = json.loads(gamma(scores_file, *options, "--json", f"--figure={figure}"))
    rows = {row["gpu"]: row for row in document["rows"]}
    scores, model = Scores.read(scores_file), read_model(str(CONFIG))
    request = PlanRequest(max_model_len=8192, kv_cache_dtype="fp8")
    for name in ("l4", "l40s"):
        plan = make_plan(model.shape, find_gpu(name), request)
        manifest = solve_resident(scores, SolveSettings(), plan.residency, plan.weight_budget_bytes, name)
        assert rows[name]["budget_bytes"] == plan.weight_budget_bytes
        assert rows[name]["tensor_bytes"] == manifest.tensor_bytes
        assert rows[name]["predicted_loss"] == pytest.approx(manifest.proof.objective, rel=1e-12)
        assert rows[name]["predicted_loss"] < rows[name]["uniform_predicted_loss"]
    gpus = {gpu["gpu"]: gpu for gpu in document["gpus"]}
    assert {name: gpu["fits"] for name, gpu in gpus.items()} == {
        "l40s": True,
        "l4": True,
        "t4": False,
        "rtx4060": False,
    }
    assert "needs" in gpus["rtx4060"]["message"]
    assert gpus["l4"]["dollars_a_month"] == 0.5 * 730
    curve = [row["tensor_bytes"] for row in document["rows"] if not row["gpu"]]
    assert curve[0] <= rows["l4"]["tensor_bytes"] <= rows["l40s"]["tensor_bytes"] == max(curve)
    assert ">l40s</text>" in figure.read_text()
    table = gamma(scores_file, *options)
    assert "l4 instead of l40s saves $730 a month" in table.replace("\n", " ")
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "l4"], "--model"),
        (["--gpus", "l5", "--model", CONFIG], "l5"),
        (["--gpus", "l4", "--model", CONFIG, "--price", "h100=3"], "h100"),
        (["--gpus", "l4", "--model", CONFIG, "--price", "l4=free"], "NAME=DOLLARS"),
        (["--price", "l4=1", "--from", "3bits", "--to", "4bits"], "--gpus"),
        (["--from", "3bits"], "--to"),
        ([], "--from"),
    ],
)
def test_bad_input_gets_one_clear_line(scores_file, options, message):
    error = gamma(scores_file, *options, code=2)
    assert message in error
    assert "Traceback" not in error
