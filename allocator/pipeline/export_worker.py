"""`python -m allocator.pipeline.export_worker`: one export as a process of its own, told on stdin, reporting on stdout.

For callers that must not load torch, such as the sidecar. stdin has one JSON object with `model`, `manifest`, `bank`
and `out` and then stays open: when it closes, the caller is gone and the work stops. `model` may be a hub id, `bank`
and `out` are folders. stdout has one JSON object a line: those of `--progress json` while it runs, at the end
`{"done": true, "files": {name: bytes}}` or `{"error", "exit_code"}`.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

__all__ = ["main"]

_TOLD_SECONDS = 1.0


def main() -> int:
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_caller, daemon=True).start()
    from allocator.contract.errors import GammaError

    try:
        _say(_export(task))
        return 0
    except GammaError as error:
        _say({"error": str(error), "exit_code": error.exit_code})
        return error.exit_code
    except Exception as error:  # the caller shows it: a full disk, a damaged file, no memory
        _say({"error": f"{type(error).__name__}: {error}", "exit_code": 1})
        return 1


def _export(task: dict[str, str]) -> dict[str, Any]:
    from allocator.contract.manifest import Manifest
    from allocator.export import ExportSettings
    from allocator.pipeline import export, resolve_model
    from allocator.run.progress_lines import ProgressLines, json_line, keep_telling

    manifest = Manifest.read(Path(task["manifest"]))
    lines = ProgressLines(_print, json_line, every=_TOLD_SECONDS)
    with keep_telling(lines):
        report = export(
            manifest, resolve_model(task["model"]), Path(task["bank"]), Path(task["out"]),
            ExportSettings(overwrite=True), lines.tracker,
        )  # fmt: skip
    return {"done": True, "files": report.written}


def _end_with_caller() -> None:
    while sys.stdin.read(4096):
        pass
    os._exit(1)


def _say(line: dict[str, Any]) -> None:
    _print(json.dumps(line))


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")  # in one piece: the thread that keeps telling writes too
    sys.stdout.flush()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
