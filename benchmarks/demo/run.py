"""The whole line: learn, solve, export, serve with vLLM, and one completion over the OpenAI API.

    make demo                   # on a small model of the project's own
    make demo MODEL=smollm2     # on SmolLM2-135M-Instruct, or another of benchmarks/real_models; ends with an answer
                                # (214 CPU seconds on two cores of Zen 5)

Everything it writes is in demo-out/. A second run uses the candidates and scores of the first again.
"""

import argparse
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
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from allocator.contract.errors import GammaError  # noqa: E402
from benchmarks.real_models.catalogue import real_models  # noqa: E402
from benchmarks.real_models.models import ready  # noqa: E402

MODEL = Path("benchmarks/demo/model")
OUT = Path("demo-out")
BUDGET = "2000000"
START_SECONDS = 900  # a busy machine is slow to start one; a server that dies is seen at once


@dataclass(frozen=True)
class Demo:
    """budget: of `gamma fit`, all its options; chat: the prompt is a message that the model's chat template renders."""

    model: Path
    out: Path
    budget: tuple[str, ...]
    prompt: str
    chat: bool = False


SMALL = Demo(
    MODEL,
    OUT,
    ("--budget", BUDGET, "--effort", "fast", "--group-size", "64", "--sequences", "24", "--sequence-length", "256"),
    "It was a dark night, and the old man",
)


def real(name: str) -> Demo:
    """One of benchmarks/real_models, fetched if it is not there: at 4.5 bits a weight, on little text, few widths."""
    model = real_models([name])[0]
    chat = (ready(model) / "chat_template.jinja").exists()
    text = ("--sequences", "8", "--sequence-length", "256")
    budget = ("--average-bits", "4.5", "--effort", "fast", "--widths", "3,4,5,8,16", *text)
    prompt = "What is the capital of France, and what is it known for?" if chat else "The capital of France is"
    return Demo(model.folder, OUT / name, budget, prompt, chat)


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


def complete(url: str, demo: Demo) -> str:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    if demo.chat:
        reply = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": demo.prompt}], max_tokens=120, temperature=0
        )
        return reply.choices[0].message.content or ""
    answer = client.completions.create(
        model="demo", prompt=demo.prompt, max_tokens=80, temperature=0.7, seed=1, extra_body={"repetition_penalty": 1.1}
    )
    return demo.prompt + answer.choices[0].text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", help="a name of benchmarks/real_models/models.json; default: the demo model"
    )
    name = parser.parse_args().model
    os.chdir(ROOT)
    started = time.monotonic()
    try:
        demo = real(name) if name else SMALL
    except GammaError as error:
        raise SystemExit(f"demo: {error}") from None
    demo.out.mkdir(parents=True, exist_ok=True)
    group_size = demo.budget[demo.budget.index("--group-size") :][:2] if "--group-size" in demo.budget else ()

    say("what is in the model")
    run("gamma", "inspect", str(demo.model), *group_size)
    say(f"learn, solve for {' '.join(demo.budget[:2]).removeprefix('--')}, export")
    mixed, work = demo.out / "checkpoint", demo.out / "work"
    run("gamma", "fit", str(demo.model), "--out", str(mixed), "--work", str(work), "--overwrite", *demo.budget)
    say("serve it with vLLM")
    with served(mixed, demo.out / "server.log") as url:
        text = complete(url, demo)
    say("the completion, fetched with the openai client")
    print(f"{demo.prompt}\n\n{text}" if demo.chat else text)
    say(f"server stopped; done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    if shutil.which("vllm", path=str(Path(sys.executable).parent)) is None:
        raise SystemExit("run `make demo`, which sets the environment up first")
    main()
