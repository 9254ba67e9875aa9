"""Peak memory and seconds a block of `gamma learn` on the shapes of large models, random weights, on this machine.

Candidates are built on a full batch of calibration tokens (the working memory does not grow beyond one) and the
command is killed when they are done; the learning runs on a few short sequences, so that it ends. The command is
stopped by SIGTERM after `--minutes` and given again until it is done, as a user would on a machine that is lent by the
hour; peaks are the largest of all pieces, seconds their sum. `--pieces 1` runs one piece only and keeps what it did for
the next call.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.record import claim, write_result  # noqa: E402
from benchmarks.scale.models import make_model  # noqa: E402

BLOCKS = 2
LIMIT_GIB = 16.0
STOPPED, KILLED = 75, -signal.SIGKILL


@dataclass(frozen=True)
class Case:
    """What is run: candidates only, or all of `gamma learn` on rtn candidates."""

    model: str
    part: Literal["candidates", "learning"]
    quantizer: str
    sequences: int
    length: int
    widths: str = "2,3,4,5,6,8,16"

    @property
    def name(self) -> str:
        return f"{self.model}, {self.part}, {self.quantizer}"


CASES = [
    Case(model, *rest)
    for model in ("Llama-3.1-8B", "Qwen3-32B")
    for rest in (
        ("candidates", "rtn", 4, 1024),
        ("candidates", "gptq", 4, 1024, "2,4,16"),  # each width takes the same memory, and the same time anew
        ("candidates", "kfac", 4, 1024, "2,4,16"),
        ("learning", "rtn", 4, 64),
    )
]


def run_piece(case: Case, model: Path, work: Path, minutes: float) -> dict[str, Any]:
    """One run of `gamma learn`: whether it is done, its peak RSS, and wall seconds by phase."""
    text = model / "text.txt"
    text.write_text("".join(chr(32 + (i * i + 7 * i) % 90) for i in range(case.sequences * case.length * 2)))
    command = [
        sys.executable, "-m", "allocator.cli.main", "learn", str(model), "--out", str(work),
        "--quantizer", case.quantizer, "--widths", case.widths, "--calibration", str(text),
        "--sequences", str(case.sequences), "--sequence-length", str(case.length), "--progress", "json",
    ]  # fmt: skip
    since = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT)
    timer = threading.Timer(minutes * 60, lambda: process.send_signal(signal.SIGTERM))
    timer.start()
    seconds: dict[str, float] = {}
    phase, lines, done = "start", [], False
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        step = json.loads(line).get("step", phase) if line.startswith("{") else phase
        if step != phase:
            now = time.monotonic()
            seconds[phase] = seconds.get(phase, 0.0) + now - since
            phase, since = step, now
            print(f"  {case.name}: {phase}", flush=True)
            if case.part == "candidates" and "candidates of the vocabulary" in seconds:
                process.kill()
                done = True
    _, status, usage = os.wait4(process.pid, 0)
    timer.cancel()
    if not done:
        seconds[phase] = seconds.get(phase, 0.0) + time.monotonic() - since
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, STOPPED, KILLED if done else 0):
        raise SystemExit("".join(lines[-20:]) + f"exit code {code}")
    return {
        "done": done or code == 0,
        "peak_rss_gib": usage.ru_maxrss / 2**20,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "seconds": {p: round(s, 1) for p, s in seconds.items()},
    }


def run_case(case: Case, folder: Path, minutes: float, pieces: int) -> dict[str, Any] | None:
    """The row of one case; None if it is not done after `pieces` pieces."""
    model, work = folder / case.model, folder / case.name.replace(", ", "-")
    record = folder / f"{work.name}-pieces.json"
    if not (model / "config.json").exists():
        print(f"  {case.name}: writing {BLOCKS} blocks", flush=True)
        make_model(case.model, BLOCKS, model)
    ran = json.loads(record.read_text()) if record.exists() else []
    for _ in range(pieces):
        if ran and ran[-1]["done"]:
            break
        ran.append(run_piece(case, model, work, minutes))
        record.write_text(json.dumps(ran))
    if not ran[-1]["done"]:
        return None
    shutil.rmtree(work, ignore_errors=True)
    phases = {p: sum(piece["seconds"].get(p, 0.0) for piece in ran) for piece in ran for p in piece["seconds"]}
    of_blocks = {p: s for p, s in phases.items() if p not in ("start", "reading the model", "reading text")}
    return {
        "case": case.name,
        "blocks": BLOCKS,
        "tokens": case.sequences * case.length,
        "widths": case.widths,
        "group_size": 128,
        "peak_rss_gib": round(max(piece["peak_rss_gib"] for piece in ran), 2),
        "cpu_seconds_per_block": round(sum(piece["cpu_seconds"] for piece in ran) / BLOCKS),
        "seconds_per_block_by_phase": {p: round(s / BLOCKS, 1) for p, s in of_blocks.items()},
        "pieces": len(ran),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folder = ROOT / "bench-out" / "scale"
    parser.add_argument("--folder", type=Path, default=folder, help="models and work folders (10 GB)")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--pieces", type=int, default=1000)
    parser.add_argument("--only", help="one case, e.g. 'Qwen3-32B, candidates, gptq'")
    parser.add_argument("--partial", action="store_true", help="write the result of the cases that are done")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rows, missing = [], []
    for case in CASES:
        saved = args.folder / f"{case.name.replace(', ', '-')}.json"
        if not saved.exists() and args.only in (None, case.name):
            row = run_case(case, args.folder, args.minutes, args.pieces)
            if row is not None:
                saved.write_text(json.dumps(row))
        if saved.exists():
            rows.append(json.loads(saved.read_text()))
            print(json.dumps(rows[-1]))
        else:
            missing.append(case.name)
            print(f"{case.name}: not done yet; give the command again")
    if missing and not (args.partial and rows):
        return
    claims = []
    for row in rows:
        if row["case"].startswith("Qwen3-32B"):
            peak = row["peak_rss_gib"]
            text = f"peak RSS of gamma learn in GiB: {row['case']}, {row['blocks']} blocks, {row['tokens']} tokens"
            claims.append(claim(text, peak, f"< {LIMIT_GIB:.0f}", peak < LIMIT_GIB))
    command = "make bench-scale" + (f" (partial: without {'; '.join(missing)})" if missing else "")
    print(write_result("scale", command, [0], rows, claims).relative_to(ROOT))


if __name__ == "__main__":
    main()
