"""The whole line on the demo model: learn, solve, export, serve with vLLM, and one completion over the OpenAI API.

    make demo

Everything it writes is in demo-out/. A second run uses the candidates and scores of the first again.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from openai import OpenAI

ROOT = Path(__file__).resolve().parents[2]
MODEL = Path("benchmarks/demo/model")
OUT = Path("demo-out")
BUDGET = "2000000"
PROMPT = "It was a dark night, and the old man"
START_SECONDS = 300


def say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def run(*command: str) -> None:
    print("$ " + " ".join(command), flush=True)
    subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def served(checkpoint: Path, log: Path) -> Iterator[str]:
    """A running `vllm serve` for `checkpoint`; yields its base URL, stops the server and its workers at the end."""
    port = free_port()
    command = [
        "vllm",
        "serve",
        str(checkpoint),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        "demo",
    ]
    # Eager: compiling would take longer than the demo runs. A small share of memory, since others use it too.
    command += ["--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager", "--gpu-memory-utilization", "0.2"]
    print("$ " + " ".join(command), flush=True)
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"} | os.environ
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    with log.open("w") as output:
        server = subprocess.Popen(
            [str(Path(sys.executable).parent / "vllm"), *command[1:]],
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while not answers(f"{url}/health"):
            if server.poll() is not None or time.monotonic() > deadline:
                tail = "".join(log.read_text().splitlines(keepends=True)[-30:])
                raise SystemExit(f"{tail}\nthe server did not start; its whole log is {log}")
            time.sleep(0.5)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGINT)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def complete(url: str) -> str:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=80, temperature=0.7, seed=1, extra_body={"repetition_penalty": 1.1}
    )
    return answer.choices[0].text


def main() -> None:
    os.chdir(ROOT)
    started = time.monotonic()
    OUT.mkdir(exist_ok=True)
    common = ["--group-size", "64", "--sequences", "24", "--sequence-length", "256"]

    say("what is in the model")
    run("gamma", "inspect", str(MODEL), "--group-size", "64")
    say(f"learn, solve for {BUDGET} bytes, export")
    mixed = OUT / "checkpoint"
    run(
        "gamma",
        "fit",
        str(MODEL),
        "--budget",
        BUDGET,
        "--out",
        str(mixed),
        "--work",
        str(OUT / "work"),
        "--overwrite",
        *common,
    )
    say("serve it with vLLM")
    with served(mixed, OUT / "server.log") as url:
        text = complete(url)
    say("the completion, fetched with the openai client")
    print(PROMPT + text)
    say(f"server stopped; done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    if shutil.which("vllm", path=str(Path(sys.executable).parent)) is None:
        raise SystemExit("run `make demo`, which sets the environment up first")
    main()
