"""`gamma plan` as a user runs it: nothing heavy is imported, and one clear line for bad input."""

import json
import subprocess
import sys

import pytest

from allocator.cli.main import main
from tests.configs import FOLDER

MODEL = str(FOLDER / "qwen3-32b.json")


def test_plan_prints_every_line_with_its_basis_and_the_verdict(capsys):
    arguments = ["--gpu", "rtx4090", "--max-model-len", "16K", "--max-num-seqs", "4", "--kv-cache-dtype", "fp8"]
    assert main(["plan", MODEL, *arguments]) == 0
    out = capsys.readouterr().out
    for word in ("device memory", "KV cache", "activations", "cuda graphs", "non-torch", "slack", "left for weights"):
        assert word in out
    for basis in ("exact", "measured", "formula"):
        assert basis in out
    assert "yes: fits at 3.1" in out
    assert "4 sequences of 16,384" in out


def test_what_linear_attention_keeps_of_each_sequence_is_printed(capsys):
    model = str(FOLDER / "qwen3.5-27b.json")
    assert main(["plan", model, "--gpu", "l40s", "--max-model-len", "32768", "--max-num-seqs", "8"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "27,356,728,560 parameters" in out
    assert "recurrent state 2.297 2,466,250,752 exact 8 x 2 of 48 layers" in out
    assert "8 sequences of 32,768 at once" in out


def test_no_comes_with_the_number_that_makes_it_yes(capsys):
    assert main(["plan", MODEL, "--gpu", "rtx4080", "--max-model-len", "16384", "--max-num-seqs", "4"]) == 0
    out = capsys.readouterr().out
    assert "no: needs 11." in out
    assert "GiB more: --max-model-len 5120 fits" in out


def test_one_sequence_at_a_time_is_said_where_nobody_gave_a_number(capsys):
    """vLLM is told the number of the plan, and would run more."""
    assert main(["plan", MODEL, "--gpu", "rtx4090", "--max-model-len", "8192"]) == 0
    assert "planned for one sequence at a time" in " ".join(capsys.readouterr().out.split())
    assert main(["plan", MODEL, "--gpu", "rtx4090", "--max-model-len", "8192", "--max-num-seqs", "1"]) == 0
    assert "one sequence at a time" not in " ".join(capsys.readouterr().out.split())


def test_without_a_gpu_it_says_which_ones_do(capsys):
    assert main(["plan", MODEL, "--max-model-len", "8192", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    verdicts = {plan["device"]["name"]: plan["verdict"]["fits"] for plan in plans}
    assert not verdicts["NVIDIA GeForce RTX 4060"]
    assert verdicts["NVIDIA H100 80GB HBM3"]
    assert main(["plan", MODEL, "--max-model-len", "8192"]) == 0
    assert "RTX 4090" in capsys.readouterr().out


def test_plan_imports_nothing_heavy():
    """It is asked often, and answers at once: `make bench-cli` has the time."""
    code = (
        "import sys; from allocator.cli.main import main\n"
        f"main(['plan', {MODEL!r}, '--gpu', 'h100', '--max-model-len', '8192']); print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "NVIDIA H100" in done.stdout
    loaded = set(done.stderr.split())
    assert "allocator.plan" in loaded
    assert not loaded & {"torch", "vllm", "transformers", "ortools", "numpy", "huggingface_hub", "fastapi"}


BAD = {
    "unknown gpu": (["--gpu", "rtx4091"], "GPU 'rtx4091' is not known; nearest are rtx4090"),
    "gpu without kernels": (["--gpu", "v100"], "compute capability 7.0"),
    "unit": (["--gpu-memory", "24XB"], "--gpu-memory: '24XB': unit 'XB' is not known"),
    "negative": (["--gpu-memory", "-3GiB"], "'-3GiB' is no amount of memory"),
    "context": (["--gpu", "h100", "--max-model-len", "40961"], "--max-model-len 40961 is beyond the model's 40960"),
    "context as text": (["--gpu", "h100", "--max-model-len", "long"], "--max-model-len 'long' is no whole number"),
    "no sequences": (["--gpu", "h100", "--max-num-seqs", "0"], "--max-num-seqs 0: input should be greater"),
    "ranks": (["--gpu", "h100", "--tensor-parallel-size", "3"], "does not divide the model's 64 attention heads"),
    "stages": (["--gpu", "h100", "--pipeline-parallel-size", "65"], "more than the model's 64 blocks"),
    "kv dtype": (["--gpu", "h100", "--kv-cache-dtype", "int3"], "'int3' is not known; allowed are auto"),
    "fp8 on turing": (["--gpu", "t4", "--kv-cache-dtype", "fp8"], "needs compute capability 8.0"),
    "utilization": (["--gpu", "h100", "--gpu-memory-utilization", "92"], "give a number above 0 and at most 1"),
    "no room for cuda": (["--gpu", "rtx4060", "--gpu-memory-utilization", "0.98"], "give at most 0.932"),
    "mig": (["--gpu", "h100:9g.9gb"], "no MIG profile '9g.9gb'"),
    "two devices": (["--gpu", "h100", "--gpu-memory", "8GiB"], "give one of --gpu and --gpu-memory"),
    "unknown option": (["--gpu", "h100", "--max-modl-len", "5"], "unrecognized arguments"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_exit_code_2(capsys, case):
    arguments, message = BAD[case]
    try:
        code = main(["plan", MODEL, *arguments])
    except SystemExit as stopped:
        code = stopped.code
    err = capsys.readouterr().err
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("model", ["./no-such-folder", "no-such-file.json"])
def test_missing_model_is_named(capsys, model):
    assert main(["plan", model, "--gpu", "h100"]) == 2
    assert f"{model}: no such folder, and no Hugging Face id" in capsys.readouterr().err


def test_hub_id_without_network_is_explained(capsys, monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    from allocator.model import hf_config

    monkeypatch.setattr(hf_config, "resolves", lambda address: False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert main(["plan", "nobody/no-model", "--gpu", "h100"]) == 2
    assert "its config.json cannot be downloaded" in capsys.readouterr().err


def test_plan_of_another_quantized_model_is_refused(capsys, tmp_path):
    config = json.loads((FOLDER / "qwen3-8b.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path), "--gpu", "h100"]) == 2
    assert "already quantized (quantization_config, quant_method 'awq')" in capsys.readouterr().err


def test_a_model_that_is_quantized_already_is_planned_as_what_it_is_dequantized_to(capsys, tmp_path):
    config = json.loads((FOLDER / "qwen3-8b.json").read_text())
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    answers = []
    for name, more in (("plain", {}), ("fp8", {"quantization_config": fp8})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | more))
        assert main(["plan", str(tmp_path / name), "--gpu", "h100", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert [(answer.pop("model"), answer.pop("digest"))[0] for answer in answers] == ["plain", "fp8"]
    assert answers[0] == answers[1]
