# ruff: noqa: E402 - torch and vllm are optional: imported only when they are there
"""Engines on a GPU, captured graphs and all, against Hugging Face transformers with the dequantized weights."""

import pytest

torch = pytest.importorskip("torch")

from tests.e2e.conftest import DEMO, mixed, succeeded
from tests.e2e.test_answers import TEXT, logit_error

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_answers_of_the_demo_model(serving, tmp_path, run_engines, eager):
    from transformers import AutoTokenizer

    from tests.e2e.make_checkpoint import make_checkpoint, write_dequantized

    make_checkpoint(DEMO, tmp_path / "gamma", mixed)
    write_dequantized(tmp_path / "gamma", tmp_path / "dequantized")
    tokens = AutoTokenizer.from_pretrained(DEMO)(TEXT)["input_ids"][:96]
    steps = {
        name: [["generate", {"prompts": [tokens[:17], tokens[5:9]], "tokens": 24}],
               ["score", {"prompt": tokens, "save": str(tmp_path / f"{name}.pt")}]]
        for name in ("transformers", "humming")
    }  # fmt: skip
    options = {"dtype": "bfloat16", "enforce_eager": eager, "gpu_memory_utilization": 0.3}
    jobs = [
        {"name": "transformers", "model": str(tmp_path / "dequantized"), "steps": steps["transformers"]},
        {
            "name": "humming",
            "model": str(tmp_path / "gamma"),
            "kernel": "humming",
            "options": options,
            "steps": steps["humming"],
        },
    ]
    results = run_engines(jobs, tmp_path)
    _, expected = succeeded(results["transformers"])
    _, given = succeeded(results["humming"])
    assert given == pytest.approx(expected, rel=2e-2)
    assert logit_error(torch.load(tmp_path / "humming.pt"), torch.load(tmp_path / "transformers.pt")) < 5e-2
