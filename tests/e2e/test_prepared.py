"""`vllm serve --config` starts from what `gamma prepare` wrote, with nothing else given but where to listen."""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.e2e.test_server import PROMPT, launch

pytest.importorskip("torch")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
DEMO = Path(__file__).resolve().parents[2] / "benchmarks" / "demo" / "model"


def gamma(*arguments: object) -> str:
    command = [sys.executable, "-m", "allocator.cli.main", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_prepared_folder_is_served_by_its_config_alone(learned, environment, tmp_path):
    store, out = tmp_path / "store", tmp_path / "served"
    gamma("store", "add", learned, "--model", DEMO, "--store", store, "--name", "demo")
    gamma(
        "prepare", "demo", "--store", store, "--out", out, "--budget", "3.5bits", "--max-model-len", 128,
        "--max-num-seqs", 2, "--served-model-name", "prepared", "--gpu-memory-utilization", 0.2,
    )  # fmt: skip
    with launch(["--config", out / "vllm.yaml"], environment, tmp_path / "serve.log") as server:
        body = {"model": "prepared", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
        request = urllib.request.Request(
            f"{server.address}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 4
        with urllib.request.urlopen(f"{server.address}/models") as response:
            (model,) = json.load(response)["data"]
    assert (model["id"], model["root"], model["max_model_len"]) == ("prepared", str(out / "checkpoint"), 128)
