"""What is run when a card is at hand for a quarter of an hour, in the order of its worth.

    python benchmarks/gpus/card.py --out FOLDER             # on the card, offline
    python benchmarks/gpus/card.py --out FOLDER --dry-run   # on a CPU: what of it can be tried there
    python benchmarks/gpus/card.py --list

Each step is a program of its own, with a time limit, so that one that fails or hangs takes no other with it. FOLDER
gets STEP.json (command, seconds, exit status, the end of its output) and what the step itself writes. The same call
again goes on with the steps that have not succeeded; a step for which the time left is too short is passed over.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from allocator.contract.documents import write_atomically  # noqa: E402

LIMIT_SECONDS = 480
_TAIL = 6000


@dataclass(frozen=True)
class Step:
    """`seconds` are expected on an H100, by guess until a card says; twice as many end it. dry: what of it a CPU can
    try, None for nothing. Arguments may name OUT, the folder of results."""

    name: str
    seconds: float
    command: tuple[str, ...]
    dry: tuple[str, ...] | None


_TESTS = ("-m", "pytest", "-p", "no:cacheprovider", "-q", "-m", "gpu")
_PRODUCTS = ("benchmarks/kernels/bench.py", "--few", "OUT/products.rows.json")
_SERVING = ("benchmarks/serving/bench.py",)
_CAPS = ("benchmarks/gpus/caps.py",)
_ON_CPU = ("--model", "Qwen3-0.6B", "--kernel", "native", "--device-memory", "24GiB", "--caps", "3GiB")
_LEARNING = ("benchmarks/gpus/learning.py", "--out", "OUT/learning.rows.json")
_KERNEL_TESTS, _ENGINE_TESTS = "tests/gpu/test_humming.py", "tests/gpu/test_engine.py"


def _eager(name: str) -> tuple[str, ...]:
    return ("--enforce-eager", "--out", f"OUT/{name}.rows.json")


STEPS = (
    Step("kernels", 50, (*_TESTS, _KERNEL_TESTS), (*_TESTS, "--collect-only", _KERNEL_TESTS)),
    Step("engines", 70, (*_TESTS, _ENGINE_TESTS), (*_TESTS, "--collect-only", _ENGINE_TESTS)),
    Step("products", 45, _PRODUCTS, ("benchmarks/kernels/bench.py", "--help")),
    Step("servers", 125, (*_SERVING, "--only", "Qwen3-8B", "--rounds", "1"), (*_SERVING, "--help")),
    Step("caps", 70, (*_CAPS, "--caps", "24GiB", "--out", "OUT/caps.rows.json"), (*_CAPS, *_ON_CPU, *_eager("caps"))),
    Step("caps-16", 35, (*_CAPS, "--caps", "16GiB", *_eager("caps-16")), None),
    Step("learning", 25, _LEARNING, (*_LEARNING, "--sequences", "8")),
    Step(
        "lora",
        20,
        (*_CAPS, "--model", "Qwen3-0.6B", "--caps", "8GiB", "--lora", *_eager("lora")),
        (*_CAPS, *_ON_CPU, "--lora", *_eager("lora")),
    ),
    Step("answers", 35, (*_SERVING, "--only", "answers"), None),
)
"""The order of issue and worth: what is right, how fast, how large, and the rest."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="these steps, done or not")
    parser.add_argument("--seconds", type=float, default=LIMIT_SECONDS, help="for all steps (default 480)")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, what of each step can be tried there")
    parser.add_argument("--list", action="store_true", help="steps and expected seconds, and run nothing")
    args = parser.parse_args()
    if args.list:
        for step in STEPS:
            print(f"{step.seconds:4.0f} s  {step.name:9s} python {' '.join(step.command)}")
        print(f"{sum(step.seconds for step in STEPS):4.0f} s  of {LIMIT_SECONDS}")
        return
    if args.out is None:
        parser.error("--out FOLDER is needed")
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for step in STEPS:
        command = step.dry if args.dry_run else step.command
        if command is None or (args.only and step.name not in args.only):
            continue
        kept = args.out / f"{step.name}.json"
        if not args.only and kept.exists() and json.loads(kept.read_text())["status"] == 0:
            print(f"{step.name}: done before")
            continue
        left = args.seconds - (time.monotonic() - started)
        if not args.dry_run and left < step.seconds:
            print(f"{step.name}: passed over, {left:.0f} s are left and it takes {step.seconds}")
            continue
        result = run(step, command, args.out, None if args.dry_run else min(2 * step.seconds, left))
        write_atomically(kept, json.dumps(result, indent=1))
        print(f"{step.name}: status {result['status']} after {result['seconds']} s", flush=True)


def run(step: Step, command: tuple[str, ...], out: Path, limit: float | None) -> dict[str, Any]:
    """One step in a process group of its own, of which nothing is left. `status` 124: it ran past its limit."""
    arguments = [sys.executable, *(text.replace("OUT", str(out.resolve())) for text in command)]
    variables = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    log, started = out / f"{step.name}.log", time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = 124
        finally:
            for sent in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, sent)
                    process.wait(5)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue
    return {
        "step": step.name,
        "command": " ".join(arguments),
        "status": status,
        "seconds": round(time.monotonic() - started, 1),
        "expected_seconds": step.seconds,
        "output": log.read_text(errors="replace")[-_TAIL:],
    }


if __name__ == "__main__":
    main()
