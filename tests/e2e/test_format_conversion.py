"""`--quantization gamma` serves checkpoints of other programs that stock vLLM fails on."""

import pytest

torch = pytest.importorskip("torch")

from tests.e2e.conftest import DEMO, succeeded  # noqa: E402
from tests.e2e.other_formats import write_compressed_tensors, write_dequantized, write_gptq  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PROMPTS = [[17, 300, 21, 5, 900], [4, 8, 15, 16, 23, 42, 108]]


def widths(name):
    """Different inside q/k/v and gate/up; 3, 5 and 6 bits are padded by compressed-tensors up to 0.17."""
    return {"q_proj": 4, "k_proj": 3, "v_proj": 8, "gate_proj": 2, "up_proj": 5, "down_proj": 6}.get(
        name.rpartition(".")[2], 4
    )


def gptq_widths(name):
    return {"q_proj": 4, "k_proj": 3, "v_proj": 8, "gate_proj": 2}.get(name.rpartition(".")[2], 4)


@pytest.fixture(scope="module")
def answers(serving, run_engines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other_formats")
    writers = {
        "compressed-tensors symmetric": lambda out: write_compressed_tensors(DEMO, out, widths, True),
        "compressed-tensors asymmetric": lambda out: write_compressed_tensors(DEMO, out, widths, False),
        "auto_round": lambda out: write_gptq(DEMO, out, gptq_widths, "auto_round"),
        "auto_round:auto_gptq": lambda out: write_gptq(DEMO, out, gptq_widths, "auto_round:auto_gptq"),
    }
    steps = [["generate", {"prompts": PROMPTS, "tokens": 16}]]
    jobs = []
    for name, write in writers.items():
        out = folder / name.replace(":", "-").replace(" ", "-")
        write(out)
        options = {"quantization": "gamma"}
        jobs.append({"name": name, "model": str(out), "kernel": "torch", "options": options, "steps": steps})
    for name, arguments in {
        "symmetric": (widths, True), "asymmetric": (widths, False), "gptq": (gptq_widths, False)
    }.items():  # fmt: skip
        write_dequantized(DEMO, folder / name, *arguments)
        jobs.append({"name": name, "model": str(folder / name), "steps": steps})
    stock = [{**job, "options": {}} for job in jobs if job["name"].startswith("compressed-tensors s")]
    results = run_engines(jobs, folder)
    stock_folder = folder / "stock"
    stock_folder.mkdir()
    results["stock"] = run_engines(stock, stock_folder, stock=True)["compressed-tensors symmetric"]
    return results


@pytest.mark.parametrize(
    ("name", "dequantized"),
    [
        ("compressed-tensors symmetric", "symmetric"),
        ("compressed-tensors asymmetric", "asymmetric"),
        ("auto_round", "gptq"),
        ("auto_round:auto_gptq", "gptq"),
    ],
)
def test_greedy_tokens_are_those_of_the_dequantized_model(answers, name, dequantized):
    assert succeeded(answers[name]) == succeeded(answers[dequantized])


def test_stock_vllm_fails_on_it(answers):
    assert "error" in answers["stock"]
