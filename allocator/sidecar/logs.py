"""One JSON object a line on stderr: what was asked, what was answered, how long it took, and the request id."""

import json
import sys
from datetime import UTC, datetime
from typing import Any

__all__ = ["LEVELS", "Log"]

LEVELS = ("debug", "info", "warning", "error")


class Log:
    """Writes lines of at least `level`."""

    def __init__(self, level: str = "info") -> None:
        self._least = LEVELS.index(level)

    def wants(self, level: str) -> bool:
        return LEVELS.index(level) >= self._least

    def __call__(self, level: str, event: str, **fields: Any) -> None:
        if not self.wants(level):
            return
        time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": time, "level": level, "event": event} | fields
        sys.stderr.write(json.dumps(line, ensure_ascii=True, default=str) + "\n")
