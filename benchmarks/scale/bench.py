"""Peak memory and seconds a block of `gamma learn` on the shapes of large models, random weights, on this machine.

The command is stopped by SIGTERM after `--minutes` and given again until it is done, as a user would on a machine that
is lent by the hour; peaks are the largest of all pieces, seconds their sum. `--pieces 1` runs one piece only and keeps
what it did for the next call.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.record import claim, write_result  # noqa: E402
from benchmarks.scale.models import make_model  # noqa: E402

CASES = [
    ("Llama-3.1-8B", "rtn", 2),
    ("Llama-3.1-8B", "gptq", 2),
    ("Qwen3-32B", "rtn", 2),
    ("Qwen3-32B", "gptq", 2),
]
SEQUENCES, LENGTH, STEPS = 4, 128, 1
LIMIT_GIB = 16.0
STOPPED = 75


def run_piece(case: str, model: Path, work: Path, quantizer: str, minutes: float) -> dict[str, Any]:
    """One run of `gamma learn`: its exit code, peak RSS, and wall seconds by phase."""
    text = model / "text.txt"
    text.write_text("".join(chr(32 + (i * i + 7 * i) % 90) for i in range(SEQUENCES * LENGTH * 2)))
    command = [
        sys.executable, "-m", "allocator.cli.main", "learn", str(model), "--out", str(work), "--quantizer", quantizer,
        "--calibration", str(text), "--sequences", str(SEQUENCES), "--sequence-length", str(LENGTH),
        "--passes", "1", "--steps", str(STEPS),
    ]  # fmt: skip
    start = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT)
    timer = threading.Timer(minutes * 60, lambda: process.send_signal(signal.SIGTERM))
    timer.start()
    seconds: dict[str, float] = {}
    phase, since, lines = "start", start, []
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        if line.rstrip().endswith(" ..."):
            now = time.monotonic()
            seconds[phase] = seconds.get(phase, 0.0) + now - since
            phase, since = line.rstrip().removesuffix(" ..."), now
            print(f"  {case}: {phase}", flush=True)
    _, status, usage = os.wait4(process.pid, 0)
    timer.cancel()
    seconds[phase] = seconds.get(phase, 0.0) + time.monotonic() - since
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, STOPPED):
        raise SystemExit("".join(lines[-20:]) + f"exit code {code}")
    return {
        "code": code,
        "peak_rss_gib": usage.ru_maxrss / 2**20,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "seconds": {p: round(s, 1) for p, s in seconds.items() if p != "start"},
    }


def run_case(
    name: str, quantizer: str, blocks: int, folder: Path, minutes: float, pieces: int
) -> dict[str, Any] | None:
    """The row of one case; None if it is not done after `pieces` pieces."""
    case = f"{name}, {quantizer}"
    model, work = folder / name, folder / f"{name}-{quantizer}"
    record = work / "pieces.json"
    if not (model / "config.json").exists():
        print(f"  {case}: writing {blocks} blocks", flush=True)
        make_model(name, blocks, model)
    done = json.loads(record.read_text()) if record.exists() else []
    for _ in range(pieces):
        if done and done[-1]["code"] == 0:
            break
        done.append(run_piece(case, model, work, quantizer, minutes))
        record.write_text(json.dumps(done))
    if done[-1]["code"] != 0:
        return None
    phases = {p: sum(piece["seconds"].get(p, 0.0) for piece in done) for piece in done for p in piece["seconds"]}
    return {
        "case": case,
        "blocks": blocks,
        "calibration": f"{SEQUENCES} sequences of {LENGTH} tokens, {STEPS} step a visit, 1 pass",
        "widths": [2, 3, 4, 5, 6, 8, 16],
        "group_size": 128,
        "peak_rss_gib": round(max(piece["peak_rss_gib"] for piece in done), 2),
        "cpu_seconds": round(sum(piece["cpu_seconds"] for piece in done)),
        "pieces": len(done),
        "seconds_by_phase": {p: round(s, 1) for p, s in phases.items()},
        "candidates_seconds_per_block": round(phases.get("candidates", 0.0) / blocks, 1),
        "measuring_seconds_per_block": round(phases.get("measuring", 0.0) / blocks, 1),
        "learning_seconds_per_block": round(phases.get("learning", 0.0) / blocks, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "scale-out", help="models and work folders (7 GB)")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--pieces", type=int, default=1000)
    parser.add_argument("--only", help="one case, e.g. 'Qwen3-32B, gptq'")
    args = parser.parse_args()
    rows = []
    for name, quantizer, blocks in CASES:
        case = f"{name}, {quantizer}"
        saved = args.folder / f"{name}-{quantizer}.json"
        if not saved.exists() and args.only in (None, case):
            row = run_case(name, quantizer, blocks, args.folder, args.minutes, args.pieces)
            if row is not None:
                saved.write_text(json.dumps(row))
        if saved.exists():
            rows.append(json.loads(saved.read_text()))
            print(json.dumps(rows[-1], indent=1))
        else:
            print(f"{case}: not done yet; give the command again")
    if len(rows) < len(CASES):
        return
    claims = []
    for row in rows:
        if row["case"].startswith("Qwen3-32B"):
            peak = row["peak_rss_gib"]
            text = f"peak RSS of gamma learn, {row['case']}, {row['blocks']} blocks, in GiB"
            claims.append(claim(text, peak, f"< {LIMIT_GIB:.0f}", peak < LIMIT_GIB))
    print(write_result("scale", "make bench-scale", [0], rows, claims).relative_to(ROOT))


if __name__ == "__main__":
    main()
