"""Serving speed of gamma checkpoints beside bfloat16 and stock 4-bit, on this machine.

    make bench-serving
    python benchmarks/serving/bench.py --models Qwen3-0.6B --rounds 2

All variants of a model are served at once by `vllm serve` processes of their own, eager, bfloat16. `vllm bench serve`
is the load generator; it runs inside this process, since importing it takes longer than most of its runs. Each round
gives every load to every variant in turn; a figure is the least of the rounds, to which other work on the machine can
only add. Weights are random (see checkpoints.py).
Writes benchmarks/results/serving.json.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from allocator.contract.layout import module_bytes  # noqa: E402
from allocator.contract.manifest import Manifest, average_bits  # noqa: E402
from allocator.contract.safetensors_file import read_folder_headers  # noqa: E402
from allocator.inventory import read_inventory  # noqa: E402
from benchmarks.record import claim, write_result  # noqa: E402
from benchmarks.serving.checkpoints import TOKENIZER, assign, uniform, write_checkpoint, write_model  # noqa: E402
from benchmarks.serving.servers import Server, start  # noqa: E402

OUT = Path("bench-out/serving")
MAX_MODEL_LEN = 2304
BF16, STOCK = "bf16", "stock 4 bits"
TRAINED = ROOT.parent / "shared" / "data" / "models"


@dataclass(frozen=True)
class Load:
    """`sequences` at a time; `metric` of `vllm bench serve` in milliseconds: a token after the first, or the first."""

    name: str
    sequences: int
    prompt: int
    tokens: int
    requests: int
    metric: str


LOADS = (
    Load("decode, 1 sequence", 1, 32, 32, 3, "median_tpot_ms"),
    Load("decode, 8 sequences", 8, 32, 24, 8, "median_tpot_ms"),
    Load("decode, 32 sequences", 32, 32, 16, 32, "median_tpot_ms"),
    Load("prefill, 512 tokens", 1, 512, 1, 2, "median_ttft_ms"),
    Load("prefill, 2048 tokens", 1, 2048, 1, 1, "median_ttft_ms"),
)


@dataclass(frozen=True)
class Variant:
    """One server. `planned_bytes` is what its weights take in memory, by the contract's formulas."""

    name: str
    folder: Path
    planned_bytes: int
    average_bits: float
    variables: dict[str, str]


def variants(model: str, few: bool) -> Iterator[Variant]:
    """bfloat16, stock 4-bit, and gamma's; `few` leaves out what says least."""
    source = _source(model)
    inventory = read_inventory(source)
    whole = sum(t.nbytes for t in read_folder_headers(source).values())
    yield Variant(BF16, source, whole, 16.0, {})
    stock = uniform(inventory, 4)
    folder = write_checkpoint(source, stock, OUT / f"{model}-stock", "compressed-tensors")
    yield Variant(STOCK, folder, stock.tensor_bytes, _bits(stock), {"VLLM_PLUGINS": ""})
    for bits, fusion in [(3.0, "free")] if few else [(2.5, "free"), (3.0, "free"), (3.0, "tied"), (4.0, "free")]:
        manifest = assign(inventory, bits, fusion, "quantized")  # type: ignore[arg-type]
        folder = write_checkpoint(source, manifest, OUT / f"{model}-{bits}-{fusion}")
        yield Variant(f"gamma {bits} bits, {fusion}", folder, _planned(manifest), _bits(manifest), {})


def _source(model: str) -> Path:
    if (TRAINED / model).is_dir():
        return TRAINED / model
    return write_model(model, OUT / model)


def _bits(manifest: Manifest) -> float:
    """Average bits over all modules of the program."""
    return average_bits(manifest.modules)


def _planned(manifest: Manifest) -> int:
    """Bytes that the native kernel keeps: the checkpoint's, but a zero point is a byte, and `weight_shape` goes.

    A quantized embedding keeps its packed zero points beside them, for looking tokens up.
    """
    total = manifest.other_bytes
    for name, module in manifest.modules.items():
        total += module_bytes(module)
        if module.quantized:
            total -= 16
            if not module.symmetric:
                rows, groups = module.shape[0], module.shape[1] // (module.group_size or 1)
                total += rows * groups
                if "embed_tokens" not in name:
                    total -= 4 * -(-rows * module.num_bits // 32) * groups
    return total


class Generator:
    """`vllm bench serve`, called with its own arguments."""

    def __init__(self) -> None:
        from vllm.benchmarks import serve
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        self.main = serve.main_async
        self.parser = FlexibleArgumentParser()
        serve.add_cli_args(self.parser)

    def run(self, server: Server, tokenizer: Path, load: Load, seed: int) -> dict[str, Any]:
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
        return result


def measure(model: str, rounds: int, few: bool, seconds: float) -> list[dict[str, Any]]:
    """One row a variant: the least of at most `rounds` rounds; no round begins after `seconds`."""
    begun = time.monotonic()
    generator = Generator()
    every = list(variants(model, few))
    loads = [load for load in LOADS if load.prompt + load.tokens <= _longest(every[0].folder)]
    servers: dict[str, Server] = {}
    rows: dict[str, dict[str, Any]] = {}
    try:
        for variant in every:
            log = OUT / f"{model}-{variant.name}.log".replace(" ", "-").replace(",", "")
            server = start(variant.folder, log, min(MAX_MODEL_LEN, _longest(variant.folder)), variant.variables)
            servers[variant.name] = server
            rows[variant.name] = {
                "model": model,
                "variant": variant.name,
                "average_bits_of_all_modules": round(variant.average_bits, 3),
                "checkpoint_bytes": sum(t.nbytes for t in read_folder_headers(variant.folder).values()),
                "planned_bytes": variant.planned_bytes,
                "anonymous_bytes_after_load": server.anonymous_bytes(),
                "load_seconds": server.load_seconds,
                "ready_seconds": round(server.ready_seconds, 2),
            }
            print(f"{model}, {variant.name}: ready after {server.ready_seconds:.1f} s", flush=True)
        for variant in every:  # the first requests of a server are slower
            generator.run(servers[variant.name], every[0].folder, LOADS[0], seed=99)
        samples: dict[tuple[str, str], list[tuple[float, float]]] = {}
        done = 0
        while done < rounds and (done == 0 or time.monotonic() - begun < seconds):
            for load in loads:
                for variant in every:
                    server = servers[variant.name]
                    before = server.cpu_seconds()
                    result = generator.run(server, every[0].folder, load, seed=done)
                    spent = server.cpu_seconds() - before
                    samples.setdefault((variant.name, load.name), []).append((_milliseconds(result, load), spent))
            done += 1
            print(f"{model}: round {done} done after {time.monotonic() - begun:.0f} s", flush=True)
        for (variant_name, load_name), values in samples.items():
            row = rows[variant_name].setdefault(load_name, {})
            row["milliseconds"] = round(min(ms for ms, _ in values), 2)
            row["cpu_seconds"] = round(min(cpu for _, cpu in values), 2)
            row["all_milliseconds"] = [round(ms, 2) for ms, _ in values]
    finally:
        for server in servers.values():
            server.stop()
    return list(rows.values())


def _milliseconds(result: dict[str, Any], load: Load) -> float:
    """The metric of a load; a tiny model may send all tokens at once, then the whole time counts for each of them."""
    return float(result[load.metric]) or 1000 * result["duration"] / load.tokens


def bank_rows() -> list[dict[str, Any]]:
    """The demo model from its bank with a manifest, and from a checkpoint that has to be exported first."""
    from allocator.contract.manifest import MANIFEST_NAME
    from allocator.learning import LearningSettings
    from allocator.pipeline import CandidateSettings, export, learn
    from allocator.solving import SolveSettings, solve_scores

    candidates = CandidateSettings(quantizer="rtn", group_size=64, sequences=4, sequence_length=64)
    learned = learn(TOKENIZER, OUT / "demo-work", candidates, LearningSettings(passes=0))
    manifest = solve_scores(learned.scores, SolveSettings(average_bits=3.5))
    manifest.write(OUT / "demo-manifest.json")
    begun = time.monotonic()
    export(manifest, TOKENIZER, learned.bank_folder, OUT / "demo-checkpoint", overwrite=True)
    exported = time.monotonic() - begun
    rows = []
    for name, folder, flags, variables, before in (
        ("exported checkpoint", OUT / "demo-checkpoint", (), {}, exported),
        (
            "from the bank",
            learned.bank_folder,
            ("--quantization", "gamma"),
            {"GAMMA_MANIFEST": str((OUT / "demo-manifest.json").resolve())},
            0.0,
        ),
    ):
        server = start(folder, OUT / f"demo-{name}.log".replace(" ", "-"), 256, variables, *flags)
        server.stop()
        rows.append(
            {
                "model": "demo",
                "variant": name,
                "export_seconds": round(before, 2),
                "load_seconds": server.load_seconds,
                "ready_seconds": round(server.ready_seconds, 2),
            }
        )
    assert (OUT / "demo-checkpoint" / MANIFEST_NAME).exists()
    return rows


def _longest(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["max_position_embeddings"])


def claims_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the project demands of serving on a CPU."""
    claims = []
    for model in dict.fromkeys(row["model"] for row in rows):
        by_name = {row["variant"]: row for row in rows if row["model"] == model}
        if BF16 not in by_name:
            continue
        bf16, stock = by_name[BF16], by_name[STOCK]

        def ms(row: dict[str, Any], load: str) -> float:
            return float(row[load]["milliseconds"])

        def at_least(text: str, value: float, limit: float, model: str = model, why: str | None = None) -> None:
            holds = value >= limit
            claims.append(claim(f"{model}: {text}", round(value, 3), f">= {limit}", holds, None if holds else why))

        one = LOADS[0].name
        for name, row in by_name.items():
            if not name.startswith("gamma") or one not in row:
                continue
            why = "all modules run eager, so what vLLM itself does a token counts in full; see docs/kernels.md"
            at_least(f"{name}: speed of decode at 1 sequence over bf16", ms(bf16, one) / ms(row, one), 2.5, why=why)
            at_least(f"{name}: speed of decode at 1 sequence over stock 4 bits", ms(stock, one) / ms(row, one), 1.0)
            for load in LOADS[3:]:
                if load.name in row:
                    best = min(ms(bf16, load.name), ms(stock, load.name))
                    why = "weights are dequantized anew for each prefill"
                    at_least(
                        f"{name}: speed of {load.name} over the better of both",
                        best / ms(row, load.name),
                        0.95,
                        why=why,
                    )
            saved = bf16["anonymous_bytes_after_load"] - row["anonymous_bytes_after_load"]
            planned = bf16["planned_bytes"] - row["planned_bytes"]
            difference = abs(saved - planned) / row["planned_bytes"]
            text = f"{model}: {name}: memory saved over bf16 differs from the plan by, of the planned weights"
            why = (
                None
                if difference <= 0.05
                else "vLLM keeps more of bfloat16 weights than the weights themselves on a CPU"
            )
            claims.append(claim(text, round(difference, 4), "<= 0.05", difference <= 0.05, why))
            tied = by_name.get(name.replace("free", "tied"))
            if tied is not None and tied is not row:
                for load in LOADS:
                    if load.name in row:
                        ratio = ms(tied, load.name) / ms(row, load.name)
                        at_least(f"{name}: speed of {load.name} over the tied one", ratio, 0.97)
        four = by_name.get("gamma 4.0 bits, free")
        if four is not None:
            speed = stock["load_seconds"] / max(four["load_seconds"], 0.01)
            at_least("loading at 4 bits, speed over stock 4 bits", speed, 0.8)
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["Qwen3-0.6B", "Qwen3-1.7B"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=270, help="for each model: no further round begins after this")
    parser.add_argument("--prepare", action="store_true", help="only write the checkpoints, and measure nothing")
    parser.add_argument("--no-result", action="store_true", help="print, and leave benchmarks/results alone")
    args = parser.parse_args()
    os.chdir(ROOT)
    OUT.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for model in args.models:
        if args.prepare:
            print(*(variant.name for variant in variants(model, few=model != "Qwen3-0.6B")), sep="\n", flush=True)
            continue
        if model == "ref-7m" and not (TRAINED / model).is_dir():
            print(f"{model} is not at hand and is left out")
            continue
        rows += measure(model, args.rounds, few=model != "Qwen3-0.6B", seconds=args.seconds)
        _finish(args, rows)  # each model by itself, should the run be stopped
    if args.prepare:
        return
    rows += bank_rows()
    _finish(args, rows)


def _finish(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Print the rows and claims, and write the result."""
    claims = claims_of(rows)
    for row in rows:
        figures = ", ".join(f"{k}: {v['milliseconds']} ms" for k, v in row.items() if isinstance(v, dict))
        print(f"{row['model']}, {row['variant']}: load {row['load_seconds']} s, {figures}")
    for entry in claims:
        print(f"{'holds' if entry['holds'] else 'FAILS'}  {entry['claim']}: {entry['value']} ({entry['limit']})")
    if not args.no_result:
        command = "make bench-serving" if len(sys.argv) == 1 else f"python {' '.join(sys.argv)}"
        print(f"written: {write_result('serving', command, [1, 2], rows, claims).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
