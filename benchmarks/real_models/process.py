"""A command run to its end, with what it cost."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from allocator.contract.errors import InputError

__all__ = ["NO_COST", "UNKNOWN_COST", "Cost", "run_command", "run_gamma", "sum_of"]


@dataclass(frozen=True)
class Cost:
    """CPU seconds, and the most memory that was resident, of a process and those it waited for; None: not known."""

    cpu_seconds: float | None
    peak_gib: float | None

    def record(self) -> dict[str, float | None]:
        return {key: None if value is None else round(value, 3) for key, value in asdict(self).items()}


def sum_of(costs: Sequence[Cost]) -> Cost:
    """One after the other; not known where one is not."""
    seconds, peaks = [cost.cpu_seconds for cost in costs], [cost.peak_gib for cost in costs]
    return Cost(
        sum(s for s in seconds if s is not None) if None not in seconds else None,
        max(p for p in peaks if p is not None) if None not in peaks else None,
    )


NO_COST, UNKNOWN_COST = Cost(0.0, 0.0), Cost(None, None)


def run_gamma(*arguments: str) -> Cost:
    return run_command([sys.executable, "-m", "allocator.cli.main", *arguments], f"gamma {' '.join(arguments)}")


def run_command(command: Sequence[str], name: str, environment: dict[str, Any] | None = None) -> Cost:
    """Raises InputError where it fails; what it says goes to our output."""
    print(f"$ {name}", flush=True)
    given = os.environ | (environment or {})
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), given.get("PYTHONPATH")]))
    process = subprocess.Popen(command, env=given | {"PYTHONPATH": path})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise InputError(f"`{name}` ended with {process.returncode}")
    return Cost(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20)
