"""Real servers: the OpenAI API of `vllm serve`."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

START_SECONDS = 240
PROMPT = [1, 5, 9, 20, 33]


@contextlib.contextmanager
def serve(checkpoint, environment, log_path, *flags):
    """A `vllm serve` process; gives the address of its API."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = environment | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "GAMMA_KERNEL": "torch"}
    command = [Path(sys.executable).with_name("vllm"), "serve", str(checkpoint), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "gamma", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "128", "--max-num-seqs", "2", *flags]
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", log_path)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait(process, address, log_path):
    for _ in range(START_SECONDS * 2):
        if process.poll() is not None:
            pytest.fail(f"the server ended with {process.returncode}:\n{log_path.read_text()[-3000:]}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(address):
            return
        time.sleep(0.5)
    pytest.fail(f"no answer within {START_SECONDS} s:\n{log_path.read_text()[-3000:]}")


def complete(address):
    body = {"model": "gamma", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    body["return_token_ids"] = True
    request = urllib.request.Request(
        f"{address}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)["choices"][0]["token_ids"]


@pytest.fixture(scope="module")
def expected(checkpoints):
    """The continuation that transformers gives."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoints("demo")[1], dtype=torch.float32)
    prompt = torch.tensor([PROMPT])
    with torch.inference_mode():
        output = model.generate(prompt, do_sample=False, max_new_tokens=12, min_new_tokens=12, eos_token_id=None)
    return output[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("flags", [(), ("--quantization", "gamma")], ids=["without flag", "with flag"])
def test_the_openai_api_answers(expected, checkpoints, environment, tmp_path, flags):
    with serve(checkpoints("demo")[0], environment, tmp_path / "serve.log", *flags) as address:
        assert complete(address) == expected
