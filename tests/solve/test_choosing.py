"""`--kv-cache-dtype auto-choose`: of all dtypes and assignments the pair of least total loss on a real plan."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from allocator.contract.scores import KvCacheScores
from allocator.plan import PlanRequest, find_gpu, make_plan
from allocator.plan.weights import read_model
from allocator.solve import SolveSettings, solve_resident
from allocator.solve.kv_cache_dtype import choose_kv_dtype
from tests.drawn_scores import SENSITIVITIES, draw_scores, qwen3_32b

MODEL = read_model(str(Path(__file__).parents[1] / "fixtures" / "configs" / "qwen3-32b.json"))


def plan_for(dtype, gpu="rtx4090", length=16384):
    request = PlanRequest(max_model_len=length, max_num_seqs=2, kv_cache_dtype=dtype)
    return make_plan(MODEL.shape, find_gpu(gpu), request)


@pytest.mark.parametrize("kv_loss", [1e-6, 0.05, 0.2, 50.0])
def test_the_pair_of_least_total_loss_is_chosen(kv_loss):
    scores = draw_scores(qwen3_32b(), SENSITIVITIES["log-normal, sigma 1"], 0, 0.3)
    measured = KvCacheScores(
        model=scores.model, unit="loss", calibration_digest=scores.bank_digest, tokens=1, losses={"fp8": kv_loss}
    )
    totals = {}
    for dtype, loss in (("auto", 0.0), ("fp8", kv_loss)):
        plan = plan_for(dtype)
        manifest = solve_resident(scores, SolveSettings(), plan.residency, plan.weight_budget_bytes, "x")
        totals[dtype] = loss + manifest.proof.objective
    assert totals["fp8"] - kv_loss < totals["auto"]  # what an fp8 KV cache frees buys wider weights
    chosen, options = choose_kv_dtype(scores, measured, SolveSettings(), plan_for)
    assert chosen.dtype == min(totals, key=totals.get)
    assert {option.dtype: option.total_loss for option in options} == pytest.approx(totals)
    # A card without fp8 kernels leaves one option.
    on_turing, options = choose_kv_dtype(scores, measured, SolveSettings(), lambda dtype: plan_for(dtype, "t4", 1024))
    assert on_turing.dtype == "auto"
    assert "compute capability" in options[1].message


@pytest.mark.slow
def test_gamma_fit_chooses_and_says_so(tiny_model, tmp_path):
    command = [sys.executable, "-m", "allocator.cli.main", "fit", tiny_model("llama"), "--gpu-memory", "4GiB"]
    command += ["--kv-cache-dtype", "auto-choose", "--out", tmp_path / "out", "--work", tmp_path / "work", "--json"]
    command += ["--group-size", "32", "--quantizer", "rtn", "--sequences", "4", "--sequence-length", "32"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    options = {option["dtype"]: option for option in json.loads(done.stdout)["kv_cache"]}
    kept = KvCacheScores.read(tmp_path / "work/kv_cache.json")
    assert options["fp8"]["kv_loss"] == kept.losses["fp8"] > 0
    # All of so small a model fits at 16 bits, so that an fp8 KV cache would only cost.
    assert json.loads((tmp_path / "out/plan.json").read_text())["request"]["kv_cache_dtype"] == "auto"
