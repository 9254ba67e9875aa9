"""A plan for a card of less memory than this one has, against what vLLM uses under that cap.

    python benchmarks/gpus/caps.py --caps 24GiB 16GiB --out caps.json

For each cap: `gamma plan` of Qwen3-32B's shapes says how many bits fit, the solver assigns them (for made-up scores),
and `gamma probe` starts vLLM on that checkpoint with dummy weights and `--gpu-memory-utilization` at the cap. Lines are
compared one by one, and their sum by the cap. Writes FILE: rows, one a line of a plan, and a sum each; the sums are to
be off by less than 3 %, and vLLM is never to use more than was planned. `--model Qwen3-0.6B --kernel native
--device-memory 16GiB` tries it on a CPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from allocator.contract.amounts import parse_budget  # noqa: E402
from allocator.contract.documents import write_atomically  # noqa: E402
from allocator.model import read_inventory  # noqa: E402
from allocator.plan.probe_records import ProbeRecord  # noqa: E402
from benchmarks.record import claim  # noqa: E402
from benchmarks.serving.checkpoints import SHAPES, assign, write_declaration, write_model  # noqa: E402

TRAFFIC = ["--max-model-len", "4096", "--max-num-seqs", "4"]
LORA = ["--enable-lora", "--max-lora-rank", "16"]
ALLOWED = 0.03
NOT_RESIDENT = {"device memory", "CUDA memory", "vLLM may use"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="Qwen3-32B")
    parser.add_argument("--caps", nargs="+", default=["24GiB", "16GiB"], metavar="SIZE")
    parser.add_argument("--kernel", default="humming")
    parser.add_argument("--device-memory", metavar="SIZE", help="of this device (default: what its driver reports)")
    parser.add_argument("--lora", action="store_true", help="with room for an adapter")
    parser.add_argument("--enforce-eager", action="store_true", help="no graphs, which take most of a start")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    traffic = [*TRAFFIC, *(LORA if args.lora else []), *(["--enforce-eager"] if args.enforce_eager else [])]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="gamma-caps-") as folder:
        model = write_model(args.model, Path(folder) / args.model, weights=False)
        for cap in args.caps:
            rows += measure(model, cap, args.kernel, args.device_memory, traffic, Path(folder))
            document = {"model": args.model, "traffic": traffic, "rows": rows, "claims": claims_of(rows)}
            write_atomically(args.out, json.dumps(document, indent=1))  # the next cap may fail
    for row in rows:
        print(row)


def measure(
    model: Path, cap: str, kernel: str, device_memory: str | None, traffic: list[str], folder: Path
) -> list[dict[str, Any]]:
    """One row a line of the plan: planned and measured bytes."""
    device = ["--gpu-memory", device_memory] if device_memory else ["--gpu", "auto"]
    whole = gamma("plan", str(model), *device, "--kernel", kernel, *traffic, "--probe", "none", "--json")
    share = f"{parse_budget(cap) / whole['device']['total_bytes']:.6f}"
    options = [*traffic, "--kernel", kernel, "--gpu-memory-utilization", share]
    plan = gamma("plan", str(model), *device, *options, "--probe", "none", "--json")
    bits = plan["verdict"].get("average_bits")
    if not bits:
        raise SystemExit(f"{cap}: {plan['verdict']['message']}")
    inventory = read_inventory(model)
    for step in range(20):  # the plan rounds its bits, and the solver's are those of all modules
        manifest = assign(inventory, min(bits, 8.0) - 0.05 * step, "tied", "quantized")
        checkpoint = write_declaration(model, manifest, folder / f"{cap}-{step}")
        plan = gamma("plan", str(checkpoint), *device, *options, "--probe", "none", "--json")
        if plan["verdict"]["fits"]:
            break
    record = folder / f"{cap}.json"
    gamma("probe", str(checkpoint), *options, "--record", str(record), "--json")
    found = ProbeRecord.read(record)
    planned = {line["name"]: line["nbytes"] for line in plan["lines"] if line["name"] not in NOT_RESIDENT}
    planned["weights"] = plan["planned"]["weight_bytes"]
    measured = found.lines | {"weights": max(rank.weights for rank in found.ranks)}
    common = {"cap": cap, "kernel": kernel, "average_bits": round(bits, 2), "device": found.device}
    rows = [
        common | {"line": name, "planned": planned[name], "measured": measured[name]}
        for name in sorted(planned.keys() & measured.keys())
    ]
    total = {key: sum(row[key] for row in rows) for key in ("planned", "measured")}
    error = (total["measured"] - total["planned"]) / parse_budget(cap)
    return [*rows, common | {"line": "sum", **total, "error_of_cap": round(error, 4), "seconds": found.seconds}]


def gamma(*arguments: str) -> dict[str, Any]:
    """What a verb prints with --json. A verb that fails ends this program with its own message."""
    done = subprocess.run(
        [sys.executable, "-m", "allocator.cli.main", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 4) or not done.stdout:  # 4: the plan does not fit, and says so
        raise SystemExit(f"gamma {' '.join(arguments)}: {done.stderr.strip()[-600:]}")
    return dict(json.loads(done.stdout))


def claims_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    claims = []
    for row in rows:
        if row["line"] == "sum":
            error = row["error_of_cap"]
            text = f"measured less planned bytes under a cap of {row['cap']}, over the cap"
            claims.append(claim(text, error, f"-{ALLOWED} <= error <= 0", -ALLOWED <= error <= 0))
    return claims


if __name__ == "__main__":
    main()
