"""From a card and its traffic to a checkpoint and the command that serves it."""

import json
import shlex

import pytest

pytest.importorskip("torch")

from allocator.cli.main import main
from allocator.contract.manifest import Manifest
from allocator.model import read_shape
from allocator.plan import Plan, PlannedWeights, PlanRequest, make_plan, memory_device

TRAFFIC = ["--max-model-len", "64", "--max-num-seqs", "2", "--kernel", "torch"]  # the others pad such small modules
SMALL = ["--quantizer", "rtn", "--group-size", "32", "--sequences", "4", "--sequence-length", "32"]


def card_for(model, weight_bytes):
    """Memory of a card that leaves about `weight_bytes` for the weights of `model`."""
    shape = read_shape(json.loads((model / "config.json").read_text()))
    request = PlanRequest(max_model_len=64, max_num_seqs=2, kernel="torch")
    plan = make_plan(shape, memory_device(8 << 30), request, weights=PlannedWeights(32))
    overhead = plan.line("vLLM may use").nbytes - plan.weight_budget_bytes
    return int((overhead + weight_bytes) / 0.92) + 680 * 2**20, plan  # CUDA sees 680 MiB less of a small card


def test_fit_for_a_card_writes_a_checkpoint_that_its_plan_holds(tiny_model, tmp_path, capsys):
    model, out = tiny_model("llama"), tmp_path / "out"
    _, large = card_for(model, 0)
    between = (large.uniform[1].nbytes + large.uniform[2].nbytes) // 2  # of 3 and 4 bits
    memory, _ = card_for(model, between)
    text = tmp_path / "text.txt"
    text.write_text("A sentence to calibrate with, and another one. " * 20)
    arguments = ["--gpu-memory", str(memory), *TRAFFIC, *SMALL, "--calibration", str(text)]
    assert main(["fit", str(model), *arguments, "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)

    manifest = Manifest.read(out / "gamma_manifest.json")
    assert manifest.budget.kind == "resident"
    assert 0.85 * between < manifest.budget.resident_bytes <= manifest.budget.nbytes <= between + 2
    plan = Plan.read(out / "plan.json")
    assert plan.verdict.fits
    assert plan.planned.weight_bytes == manifest.budget.resident_bytes
    assert plan.planned.sequences >= 2
    words = shlex.split(printed["serve"])
    assert words[:3] == ["vllm", "serve", str(out)]
    assert words[words.index("--max-model-len") + 1] == "64"
    saved = ["--out", str(tmp_path / "plan.json"), "--json"]
    assert main(["plan", str(model), "--gpu-memory", str(memory), *TRAFFIC, "--group-size", "32", *saved]) == 0
    scores, parts = str(tmp_path / "out-work" / "scores.json"), ["--plan", str(tmp_path / "plan.json")]
    assert main(["solve", scores, *parts, "--out", str(tmp_path / "manifest.json"), "--json"]) == 0
    capsys.readouterr()
    assert Manifest.read(tmp_path / "manifest.json").modules == manifest.modules
    verified = ["--verify", "--model", str(model), "--text", str(text), "--text-sequences", "4"]
    verified += ["--text-sequence-length", "32", "--out", str(tmp_path / "verified.json")]
    assert main(["solve", scores, *parts, *verified]) == 0
    assert "uniform 3 bits" in capsys.readouterr().out  # what fits after loading, as the plan's table has it
    assert main(["plan", str(out), "--gpu-memory", str(memory), *TRAFFIC, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["planned"] == plan.planned.model_dump()
    yaml = (out / "vllm.yaml").read_text()
    assert f'model: "{out}"\n' in yaml
    assert "max-num-seqs: 2\n" in yaml


def test_card_that_is_too_small_is_refused_before_anything_is_learned(tiny_model, tmp_path, capsys):
    model = tiny_model("llama")
    memory, _ = card_for(model, 1000)
    assert main(["fit", str(model), "--gpu-memory", str(memory), *TRAFFIC, *SMALL, "--out", str(tmp_path / "o")]) == 4
    assert "it does not fit on" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("budgets", [[], ["--gpu", "l4", "--budget", "5GiB"], ["--gpu-memory", "8GiB", "--gpu", "l4"]])
def test_budget_is_given_exactly_once(tiny_model, tmp_path, capsys, budgets):
    assert main(["fit", str(tiny_model("llama")), *budgets, "--out", str(tmp_path / "o")]) == 2
    message = "give exactly one of --gpu, --gpu-memory, --plan, --budget and --average-bits"
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_vllm_reads_the_file_that_fit_writes(tmp_path):
    pytest.importorskip("vllm")
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from allocator.plan.vllm_arguments import write_vllm_config
    from tests.configs import shape_of

    request = PlanRequest(max_model_len=4096, max_num_seqs=3, kv_cache_dtype="fp8", tensor_parallel_size=2)
    plan = make_plan(shape_of("qwen3-8b"), memory_device(24 << 30), request)
    path = write_vllm_config(plan, tmp_path)
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    args = parser.parse_args(["serve", "--config", str(path)])
    assert args.model == str(tmp_path)
    assert (args.max_model_len, args.max_num_seqs, args.max_num_batched_tokens) == (4096, 3, plan.batched_tokens)
    assert (args.kv_cache_dtype, args.tensor_parallel_size, args.gpu_memory_utilization) == ("fp8", 2, 0.92)
