"""Learning on the GPU against learning on the CPU: seconds, scores and the loss of what is chosen.

    python benchmarks/gpus/learning.py --out learning.json

The demo model (or `--model FOLDER`) is learned twice with the same settings, with the GPU visible and hidden; both
scores are solved at 3 bits, and what they choose is measured on the CPU. The losses are to be equal within 2 %.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from allocator.contract.documents import write_atomically  # noqa: E402
from allocator.contract.scores import Scores  # noqa: E402
from benchmarks.record import claim  # noqa: E402

DEMO = ROOT / "benchmarks/demo/model"
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--sequences", default="32")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="gamma-learning-") as folder:
        text = Path(folder) / "pages.txt"  # nothing was calibrated on them
        text.write_text("\n".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))))
        for place, variables in (("gpu", {}), ("cpu", HIDDEN)):
            work, started = Path(folder) / place, time.monotonic()
            options = ["--sequences", args.sequences, "--sequence-length", "256"]
            gamma(variables, "learn", str(args.model), "--out", str(work), *options)
            row = {"place": place, "model": args.model.name, "seconds": round(time.monotonic() - started, 1)}
            chosen = work / "manifest.json"
            options = ["--average-bits", "3", "--verify", "--model", str(args.model), "--out", str(chosen)]
            options += ["--text", str(text), "--text-sequences", "16", "--text-sequence-length", "128"]
            gamma(HIDDEN, "solve", str(work / "scores.json"), *options)
            rows.append(row | {"verification": json.loads(chosen.read_text()).get("verification")})
        pair = [Scores.read(Path(folder) / place / "scores.json") for place in ("gpu", "cpu")]
        rows.append({"largest_relative_difference_of_scores": round(difference(*pair), 6)})
    document = {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "rows": rows}
    write_atomically(args.out, json.dumps(document | {"claims": claims_of(rows)}, indent=1))
    print(json.dumps(rows, indent=1))


def gamma(variables: dict[str, str], *arguments: str) -> None:
    command = [sys.executable, "-m", "allocator.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, check=False)
    if done.returncode:
        raise SystemExit(f"gamma {' '.join(arguments)}: {done.stderr.strip()[-600:]}")


def difference(first: Scores, second: Scores) -> float:
    pairs = [
        (a.score, b.score)
        for name, module in first.modules.items()
        for a, b in zip(module.candidates, second.modules[name].candidates, strict=True)
    ]
    return max(abs(a - b) / max(abs(a), abs(b)) for a, b in pairs if a or b)


def claims_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    gpu, cpu = (row["verification"] for row in rows[:2])
    if not gpu or not cpu:
        return []
    value = gpu["kl"] / cpu["kl"]
    return [
        claim(
            "loss of what the GPU's scores choose over that of the CPU's",
            round(value, 4),
            "0.98 to 1.02",
            0.98 <= value <= 1.02,
        )
    ]


if __name__ == "__main__":
    main()
