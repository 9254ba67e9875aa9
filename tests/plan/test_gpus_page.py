"""docs/gpus.md says what the planner says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_row_is_that_of_the_planner():
    command = [sys.executable, ROOT / "benchmarks" / "gpus" / "table.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = (ROOT / "docs" / "gpus.md").read_text()
    rows = [line.split("|")[1:-1] for line in written.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 17 * 2 - 1  # models and contexts; Phi-4 ends at 16k
    assert all(float(row[3]) >= 2.5 and float(row[5]) >= 4.25 for row in rows)
