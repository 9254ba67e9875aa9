"""Real services for the tests: `gamma sidecar` as a process, asked over HTTP."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.waiting import wait_for


@dataclass
class Running:
    """A service, a client for it, and its process."""

    url: str
    http: httpx.Client
    process: subprocess.Popen[bytes]
    log: Path

    def post(self, path: str, body: Any, code: int = 200, **options: Any) -> Any:
        answer = self.http.post(path, json=body, **options)
        assert answer.status_code == code, answer.text
        return answer.json()

    def get(self, path: str, code: int = 200, **options: Any) -> Any:
        answer = self.http.get(path, **options)
        assert answer.status_code == code, answer.text
        return answer.json()

    def finished(self, job: str, seconds: float = 120) -> dict[str, Any]:
        """The job once it is done or failed."""

        def ended() -> dict[str, Any] | None:
            state: dict[str, Any] = self.get(f"/v1/jobs/{job}")
            return state if state["state"] in ("succeeded", "failed") else None

        return dict(wait_for(ended, lambda: self.get(f"/v1/jobs/{job}"), seconds))


@contextlib.contextmanager
def running(log: Path, *flags: object, wait: str = "/healthz", **environment: str) -> Iterator[Running]:
    """`gamma sidecar` with `flags`, on a free port; ended with SIGTERM, which must work."""
    command = [sys.executable, "-m", "allocator.cli.main", "sidecar", "--port", "0", *map(str, flags)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | environment)
    try:
        port = _port_of(process, log)
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=60) as http:
            wait_for(lambda: http.get(wait).status_code == 200, log.read_text)
            yield Running(url, http, process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def _port_of(process: subprocess.Popen[bytes], log: Path) -> int:
    def port() -> int | None:
        for line in log.read_text().splitlines():
            if '"listening"' in line:
                return int(json.loads(line)["port"])
        assert process.poll() is None, log.read_text()
        return None

    return int(wait_for(port, log.read_text))
