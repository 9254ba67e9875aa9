"""What commands that are asked often cost before and while they answer, over the imports that they cannot do without.

    make bench-cli

Each is a process of its own, the kinds take turns, and the least of the repeats counts, in CPU seconds of the process:
another program on the machine changes that little, and what the machine is makes both sides slower alike. Python's
bytecode is cached by a first round that does not count. Writes benchmarks/results/cli.json.
"""

import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.record import claim, write_result  # noqa: E402

REPEATS = 9
MODEL = ROOT / "tests" / "fixtures" / "configs" / "qwen3-32b.json"
IMPORTS = "import BaseModel and Table"
PLAN = ["plan", str(MODEL), "--gpu", "h100", "--max-model-len", "8192"]
CODE = {
    IMPORTS: "from pydantic import BaseModel; from rich.console import Console; from rich.table import Table",
    "import allocator": "import allocator",
    "gamma plan --gpu h100": f"from allocator.cli.main import main; main({PLAN!r})",
    "gamma plan, every GPU": f"from allocator.cli.main import main; main({PLAN[:2] + PLAN[4:]!r})",
    "import fastapi, uvicorn": "import fastapi, uvicorn",
    "gamma sidecar, until it would listen": (
        "from allocator.sidecar.app import create_app; from allocator.sidecar.settings import ServiceSettings;"
        "create_app(ServiceSettings(store='.'))"
    ),
}
LIMITS = [
    ("gamma plan --gpu h100", IMPORTS, 2.5),
    ("gamma plan, every GPU", IMPORTS, 3.0),
    ("import allocator", IMPORTS, 1.0),
    ("gamma sidecar, until it would listen", "import fastapi, uvicorn", 2.0),
]
"""What, over what, and at most how many times its CPU time."""


def cpu_seconds(code: str) -> float:
    """Of a Python that runs `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    for code in CODE.values():
        cpu_seconds(code)
    taken: dict[str, list[float]] = {what: [] for what in CODE}
    for _ in range(REPEATS):
        for what, code in CODE.items():
            taken[what].append(cpu_seconds(code))
    least = {what: min(seconds) for what, seconds in taken.items()}
    rows = [
        {"what": what, "repeats": REPEATS, "cpu_seconds_min": round(least[what], 3)}
        | {"cpu_seconds_median": round(sorted(seconds)[REPEATS // 2], 3)}
        for what, seconds in taken.items()
    ]
    claims = []
    for what, base, limit in LIMITS:
        ratio = round(least[what] / least[base], 2)
        claims.append(claim(f"CPU time of `{what}` over that of `{base}`", ratio, f"<= {limit}", ratio <= limit))
    for entry in (*rows, *claims):
        print(entry)
    print(f"written: {write_result('cli', 'make bench-cli', [], rows, claims).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
