"""Serving speed of gamma checkpoints beside bfloat16 and stock 4-bit, on this machine.

    make bench-serving
    python benchmarks/serving/bench.py --only Qwen3-1.7B

Pieces of some minutes each: models of real shapes with random weights (checkpoints.py), and answers.py. A piece that is
done is kept in bench-out/serving and not run again by the next call, one that was stopped is; `--only` runs one anew,
and `--claims` judges the rows of a committed result anew. Speeds are claimed of what
vLLM does by default, which is to compile; loading time and memory where the servers are eager and start one after the
other, since compiled ones load while others compile.

All variants of a piece are served at once by `vllm serve` processes of their own, in bfloat16. `vllm bench serve` is
the load generator; it runs inside this process, since importing it takes longer than most of its runs. Each round gives
every load to every variant in turn; a figure is the least of the rounds, to which other work on the machine can only
add. Small trained models are left out: at 1 ms a token their servers answer in a few pieces, whose times say nothing of
a token (0 to 5 ms in rounds of one server). Writes benchmarks/results/serving.json, on CPUs with AMX serving_amx.json,
without AVX-512 serving_avx2.json, and with an NVIDIA GPU serving_cuda.json.

    GAMMA_CPU_ISA=avx2 make bench-serving

hides AVX-512 and AMX from everything but auto-round-lib (avx2_server.py), and writes serving_avx2.json.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from allocator.contract.cpu import CPU_ISA_VARIABLE, cpu_flags, hidden_flags  # noqa: E402
from allocator.contract.documents import write_atomically  # noqa: E402
from allocator.contract.safetensors_file import read_folder_headers  # noqa: E402
from benchmarks.record import claim, read_rows, rewrite_claims, write_result  # noqa: E402
from benchmarks.serving.answers import ask  # noqa: E402
from benchmarks.serving.pieces import (  # noqa: E402
    AVX2_PIECES,
    CPU_PIECES,
    CUDA_PIECES,
    Piece,
    Variant,
    file_name,
)
from benchmarks.serving.report import Load, claims_of  # noqa: E402
from benchmarks.serving.servers import Server, start  # noqa: E402

OUT = Path(os.environ.get("GAMMA_BENCH_OUT", ROOT / "bench-out")) / "serving"
MAX_MODEL_LEN = 2304
CUDA_FLAGS = ("--kv-cache-memory-bytes", "1500M", "--cudagraph-capture-sizes", "1", "2", "4", "8", "16", "32", "512")
"""A small cache each, and no more graphs than are measured, since several servers share the GPU."""

Rows = list[dict[str, Any]]


ANSWERS = "answers"

PIECES = {
    "serving_cuda": CUDA_PIECES,
    "serving_amx": CPU_PIECES,
    "serving": CPU_PIECES,
    "serving_avx2": AVX2_PIECES,
}
"""What is run for each result. 16-bit products are several times as fast on CPUs with AMX, and as slow without AVX-512,
so these results are kept apart."""


def result_of_this_machine() -> str:
    """The name of the result that is written here."""
    if torch.cuda.is_available():
        return "serving_cuda"
    if "amx_bf16" in cpu_flags():
        return "serving_amx"
    return "serving" if "avx512f" in cpu_flags() else "serving_avx2"


class Generator:
    """`vllm bench serve`, called with its own arguments."""

    def __init__(self) -> None:
        from vllm.benchmarks import serve
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        self.main = serve.main_async
        self.parser = FlexibleArgumentParser()
        serve.add_cli_args(self.parser)

    def milliseconds(self, server: Server, tokenizer: Path, load: Load, seed: int) -> float:
        arguments = {
            "backend": "openai", "base-url": server.url, "model": "model", "tokenizer": tokenizer,
            "dataset-name": "random",
            "random-input-len": load.prompt, "random-output-len": load.tokens, "random-range-ratio": 0,
            "num-prompts": load.requests, "max-concurrency": load.sequences, "seed": seed, "temperature": 0,
        }  # fmt: skip
        texts = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
        args = self.parser.parse_args([*texts, "--ignore-eos", "--disable-tqdm"])
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            result = asyncio.run(self.main(args))
        if result["completed"] != load.requests:
            raise RuntimeError(f"{result['completed']} of {load.requests} requests of {load.name} were answered")
        return float(result[load.metric])


def measure(piece: Piece, rounds: int) -> Iterator[Rows]:
    """One row a variant, after each round."""
    generator, rows = Generator(), list[dict[str, Any]]()
    every = list(piece.variants(OUT))
    for together in [every[:1], every[1:]] if piece.apart else [every]:
        for now in _measure_together(piece, together, generator, every[0].folder, rounds):
            yield rows + now
        rows += now


def _measure_together(
    piece: Piece, every: list[Variant], generator: Generator, tokenizer: Path, rounds: int
) -> Iterator[Rows]:
    begun, load_average = time.monotonic(), round(os.getloadavg()[0], 1)
    servers: dict[str, Server] = {}
    rows: dict[str, dict[str, Any]] = {}
    samples: dict[tuple[str, str], list[float]] = {}
    try:
        for variant in every:
            log = OUT / f"{file_name(f'{piece.name} {variant.name}')}.log"
            flags = (*variant.flags, *(() if piece.compiled else ("--enforce-eager",)))
            if piece.cuda:
                flags += CUDA_FLAGS
            servers[variant.name] = start(variant.folder, log, MAX_MODEL_LEN, variant.variables, *flags)
            if not piece.cuda:
                servers[variant.name].wait_loaded()
            if not piece.compiled:
                servers[variant.name].wait_ready()
        for variant in every:
            server = servers[variant.name]
            server.wait_ready()
            rows[variant.name] = {
                "piece": piece.name,
                "model": piece.model,
                "variant": variant.name,
                "compiled": piece.compiled,
                "load_average_before": load_average,
                "average_bits_of_all_modules": round(variant.average_bits, 3),
                "checkpoint_bytes": sum(t.nbytes for t in read_folder_headers(variant.folder).values()),
                "planned_bytes": variant.planned_bytes,
                "load_seconds": server.load_seconds,
            }
            if piece.cuda:
                rows[variant.name] |= {"gpu_gib_after_load": server.gpu_gib, "kernels": server.kernels}
            else:
                rows[variant.name]["anonymous_bytes_after_load"] = server.anonymous_bytes()
        print(f"{piece.name}: servers ready after {time.monotonic() - begun:.0f} s", flush=True)
        for variant in every:  # the first requests of a server are slower
            generator.milliseconds(servers[variant.name], tokenizer, piece.loads[0], seed=99)
        for done in range(rounds):
            for load in piece.loads:
                for variant in every:
                    value = generator.milliseconds(servers[variant.name], tokenizer, load, seed=done)
                    samples.setdefault((variant.name, load.name), []).append(value)
            print(f"{piece.name}: round {done + 1} done after {time.monotonic() - begun:.0f} s", flush=True)
            for (variant_name, load_name), values in samples.items():
                figures = {"milliseconds": round(min(values), 2), "all_milliseconds": [round(ms, 2) for ms in values]}
                rows[variant_name][load_name] = figures
            yield list(rows.values())
    finally:
        for server in servers.values():
            server.stop()


def main() -> None:
    result = result_of_this_machine()
    pieces = PIECES[result]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*(piece.name for piece in pieces), ANSWERS]
    parser.add_argument("--only", choices=names, help="run this piece, also when it is done already")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="write the result of the pieces at hand, measure nothing")
    parser.add_argument("--prepare", action="store_true", help="only write the checkpoints, and measure nothing")
    parser.add_argument("--claims", metavar="NAME", help="the claims of NAME.json anew from its rows, measure nothing")
    args = parser.parse_args()
    if hidden_flags() and result != "serving_avx2":
        parser.error(f"{CPU_ISA_VARIABLE} can hide instructions of vLLM as avx2 only; set it to that, or not at all")
    if args.claims:
        rows = read_rows(args.claims)
        measured = {row["piece"] for row in rows}
        left = [name for name in (*(piece.name for piece in PIECES[args.claims]), ANSWERS) if name not in measured]
        rewrite_claims(args.claims, _judged(rows, left))
        return
    OUT.mkdir(parents=True, exist_ok=True)
    if args.prepare:
        for piece in pieces:
            if args.only in (None, piece.name):
                print(*(f"{piece.name}: {v.name}" for v in piece.variants(OUT)), sep="\n", flush=True)
        return
    run: dict[str, Callable[[], Iterator[list[dict[str, Any]]]]] = {
        p.name: partial(measure, p, args.rounds) for p in pieces
    }
    run[ANSWERS] = partial(ask, OUT)
    kept = {name: OUT / f"{file_name(name)}.json" for name in names}
    if result == "serving_avx2":
        kept[ANSWERS] = OUT / "answers-avx2.json"
    begun = {name: path.with_suffix(".part.json") for name, path in kept.items()}
    for name in names:
        if not args.report and (args.only == name or (args.only is None and not kept[name].exists())):
            for rows in run[name]():  # more complete each time, should the run be stopped
                write_atomically(begun[name], json.dumps(rows, indent=1))
            begun[name].replace(kept[name])
    left = [name for name, path in kept.items() if not path.exists()]
    paths = [kept[name] if kept[name].exists() else begun[name] for name in names]
    rows = [row for path in paths if path.exists() for row in json.loads(path.read_text())]
    _finish(result, rows, left)


def _judged(rows: Rows, left: list[str]) -> list[dict[str, Any]]:
    """The claims of the rows; a piece that is `left` is a claim that does not hold."""
    why = "stopped before the end of this piece; the next call goes on with it"
    return claims_of(rows) + [claim(f"{name}: pieces that were run", 0, "== 1", False, why) for name in left]


def _finish(name: str, rows: Rows, left: list[str]) -> None:
    """Print the rows and claims, and write the result."""
    claims = _judged(rows, left)
    for row in rows:
        print(row)
    for entry in claims:
        print(f"{'holds' if entry['holds'] else 'FAILS'}  {entry['claim']}: {entry['value']} ({entry['limit']})")
    hidden = " ".join(hidden_flags())
    command = f"{CPU_ISA_VARIABLE}=avx2 make bench-serving" if hidden else "make bench-serving"
    path = write_result(name, command, [0, 1], rows, claims, {"hidden_instructions": hidden} if hidden else {})
    print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
