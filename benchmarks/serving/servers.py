"""`vllm serve` processes for the benchmark: started, watched, measured and stopped."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Server", "start"]

_START_SECONDS = 300
_LOADING = re.compile(r"Loading weights took ([0-9.]+) seconds")
_OPTIONS = (
    "--served-model-name", "model", "--host", "127.0.0.1", "--dtype", "bfloat16", "--max-num-seqs", "32",
    "--enforce-eager", "--no-enable-prefix-caching", "--gpu-memory-utilization", "0.1", "--max-model-len",
)  # fmt: skip


@dataclass
class Server:
    """A server that answers. `load_seconds` is what vLLM's log says of loading the weights."""

    process: subprocess.Popen[bytes]
    url: str
    ready_seconds: float
    load_seconds: float

    @property
    def processes(self) -> list[int]:
        """The server and its children."""
        found, waiting = [], [self.process.pid]
        while waiting:
            pid = waiting.pop()
            found.append(pid)
            with contextlib.suppress(OSError):
                waiting += [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return found

    def cpu_seconds(self) -> float:
        """Processor time of all its processes so far."""
        ticks = 0
        for pid in self.processes:
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def anonymous_bytes(self) -> int:
        """Memory of its largest process that is no file's: the engine with weights and cache."""
        return max((_anonymous(pid) for pid in self.processes), default=0)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _anonymous(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) * 1024
    return 0


def start(folder: Path, log: Path, max_model_len: int, variables: dict[str, str] | None = None, *flags: str) -> Server:
    """Start `vllm serve` for a folder and wait until it answers. Raises RuntimeError with the end of its log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", str(folder), *_OPTIONS, str(max_model_len),
        "--port", str(port), *flags,
    ]  # fmt: skip
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"} | os.environ
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "INFO"}
    environment |= variables or {}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    url = f"http://127.0.0.1:{port}"
    while not _answers(f"{url}/health"):
        if process.poll() is not None or time.monotonic() - started > _START_SECONDS:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise RuntimeError(f"{' '.join(command)} did not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.2)
    ready = time.monotonic() - started
    loading = _LOADING.search(log.read_text())
    return Server(process, url, ready, float(loading[1]) if loading else 0.0)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
