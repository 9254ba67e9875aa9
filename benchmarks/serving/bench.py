"""Serving speed of gamma checkpoints beside bfloat16 and stock 4-bit, on this machine.

    make bench-serving
    python benchmarks/serving/bench.py --only Qwen3-1.7B

Pieces of some minutes each: models of real shapes with random weights (checkpoints.py), and answers.py. A piece that is
done is kept in bench-out/serving and not run again by the next call; `--only` runs one anew. Speeds are claimed of what
vLLM does by default, which is to compile; loading time and memory where the servers are eager and start one after the
other, since compiled ones load while others compile.

All variants of a piece are served at once by `vllm serve` processes of their own, in bfloat16. `vllm bench serve` is
the load generator; it runs inside this process, since importing it takes longer than most of its runs. Each round gives
every load to every variant in turn; a figure is the least of the rounds, to which other work on the machine can only
add. Writes benchmarks/results/serving.json. Small trained models are left out: at 1 ms a token their servers answer in
a few pieces, whose times say nothing of a token (0 to 5 ms in rounds of one server).
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from allocator.contract.documents import write_atomically  # noqa: E402
from allocator.contract.manifest import Manifest, average_bits  # noqa: E402
from allocator.contract.safetensors_file import read_folder_headers  # noqa: E402
from allocator.fitting import PlanRequest  # noqa: E402
from allocator.fitting.weights import residency_of  # noqa: E402
from allocator.inventory import read_inventory, read_shape  # noqa: E402
from benchmarks.record import claim, write_result  # noqa: E402
from benchmarks.serving.answers import ask  # noqa: E402
from benchmarks.serving.checkpoints import (  # noqa: E402
    Fusion,
    Vocabulary,
    assign,
    uniform,
    write_checkpoint,
    write_model,
)
from benchmarks.serving.report import BF16, LOADS, STOCK, Load, claims_of  # noqa: E402
from benchmarks.serving.servers import Server, start  # noqa: E402

OUT = ROOT / "bench-out" / "serving"
MAX_MODEL_LEN = 2304

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Variant:
    """One server. `planned_bytes` is what `gamma plan` says of its weights in memory."""

    name: str
    folder: Path
    planned_bytes: int | None
    average_bits: float
    variables: dict[str, str]


@dataclass(frozen=True)
class Piece:
    """Servers that run side by side: bfloat16, stock 4-bit, and gamma's at (bits, fusion, vocabulary).

    compiled: as vLLM does by default; else eager.
    """

    name: str
    model: str
    compiled: bool
    loads: tuple[Load, ...]
    gamma: tuple[tuple[float, Fusion, Vocabulary], ...]

    def variants(self) -> Iterator[Variant]:
        source = write_model(self.model, OUT / self.model)
        inventory = read_inventory(source)
        yield Variant(BF16, source, None, 16.0, {})
        stock = uniform(inventory, 4)
        folder = write_checkpoint(source, stock, OUT / f"{self.model}-stock", "compressed-tensors")
        yield Variant(STOCK, folder, None, average_bits(stock.modules), {"VLLM_PLUGINS": ""})
        for bits, fusion, vocabulary in self.gamma:
            manifest = assign(inventory, bits, fusion, vocabulary)
            name = f"gamma {bits} bits, {fusion}" + (", vocabulary at 16" if vocabulary == "16 bits" else "")
            folder = write_checkpoint(source, manifest, OUT / _file_name(f"{self.model} {name}"))
            yield Variant(name, folder, _planned(source, manifest), average_bits(manifest.modules), {})


THREE: tuple[float, Fusion, Vocabulary] = (3.0, "free", "quantized")
PIECES = (
    Piece("Qwen3-0.6B", "Qwen3-0.6B", True, LOADS, ((2.5, "free", "quantized"), THREE, (3.0, "tied", "quantized"))),
    # Apart, since seven servers at a time do not fit into 24 GiB.
    Piece("Qwen3-0.6B, more", "Qwen3-0.6B", True, LOADS, ((4.0, "free", "quantized"), (3.0, "free", "16 bits"))),
    Piece(
        "Qwen3-0.6B, eager",
        "Qwen3-0.6B",
        False,
        (LOADS[0],),
        ((2.5, "free", "quantized"), THREE, (4.0, "free", "quantized")),
    ),
    Piece("Qwen3-1.7B", "Qwen3-1.7B", True, LOADS, (THREE,)),
)
ANSWERS = "answers"


def _file_name(text: str) -> str:
    return text.replace(" ", "-").replace(",", "")


def _planned(model: Path, manifest: Manifest) -> int:
    shape = read_shape(json.loads((model / "config.json").read_text()))
    (planned,) = residency_of(shape, PlanRequest(kernel="native")).stage_bytes(manifest.modules)
    return planned


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
    begun, load_average = time.monotonic(), round(os.getloadavg()[0], 1)
    generator = Generator()
    every = list(piece.variants())
    servers: dict[str, Server] = {}
    rows: dict[str, dict[str, Any]] = {}
    samples: dict[tuple[str, str], list[float]] = {}
    try:
        for variant in every:
            log = OUT / f"{_file_name(f'{piece.name} {variant.name}')}.log"
            flags = () if piece.compiled else ("--enforce-eager",)
            servers[variant.name] = start(variant.folder, log, MAX_MODEL_LEN, variant.variables, *flags)
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
                "anonymous_bytes_after_load": server.anonymous_bytes(),
                "load_seconds": server.load_seconds,
            }
        print(f"{piece.name}: servers ready after {time.monotonic() - begun:.0f} s", flush=True)
        for variant in every:  # the first requests of a server are slower
            generator.milliseconds(servers[variant.name], every[0].folder, LOADS[0], seed=99)
        for done in range(rounds):
            for load in piece.loads:
                for variant in every:
                    value = generator.milliseconds(servers[variant.name], every[0].folder, load, seed=done)
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*(piece.name for piece in PIECES), ANSWERS]
    parser.add_argument("--only", choices=names, help="run this piece, also when it is done already")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="write the result of the pieces at hand, measure nothing")
    parser.add_argument("--prepare", action="store_true", help="only write the checkpoints, and measure nothing")
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    if args.prepare:
        for piece in PIECES:
            print(*(f"{piece.name}: {variant.name}" for variant in piece.variants()), sep="\n", flush=True)
        return
    run: dict[str, Callable[[], Iterator[list[dict[str, Any]]]]] = {
        p.name: partial(measure, p, args.rounds) for p in PIECES
    }
    run[ANSWERS] = partial(ask, OUT)
    kept = {name: OUT / f"{_file_name(name)}.json" for name in names}
    for name in names:
        if not args.report and (args.only == name or (args.only is None and not kept[name].exists())):
            for rows in run[name]():  # more complete each time, should the run be stopped
                write_atomically(kept[name], json.dumps(rows, indent=1))
    left = [name for name, path in kept.items() if not path.exists()]
    _finish([row for path in kept.values() if path.exists() for row in json.loads(path.read_text())], left)


def _finish(rows: Rows, left: list[str]) -> None:
    """Print the rows and claims, and write the result; a piece that is `left` is a claim that does not hold."""
    claims = claims_of(rows)
    why = "stopped before this piece; the next call goes on with it"
    claims += [claim(f"{name}: pieces that were run", 0, "== 1", False, why) for name in left]
    for row in rows:
        print(row)
    for entry in claims:
        print(f"{'holds' if entry['holds'] else 'FAILS'}  {entry['claim']}: {entry['value']} ({entry['limit']})")
    path = write_result("serving", "make bench-serving", [0, 1], rows, claims)
    print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
