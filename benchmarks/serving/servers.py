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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from allocator.contract.cpu import hidden_flags
from benchmarks.serving.avx2_server import HIDING

__all__ = ["Server", "start"]

_START_SECONDS = 900  # five servers compile on two cores
_LOADING = re.compile(r"Loading weights took ([0-9.]+) seconds")
_RESIDENT = re.compile(r"Model loading took ([0-9.]+) GiB")
_KERNEL = re.compile(r"Using (\w+) for|use the (\w+) kernel")
_OPTIONS = (
    "--served-model-name", "model", "--host", "127.0.0.1", "--dtype", "bfloat16", "--max-num-seqs", "32",
    "--no-enable-prefix-caching", "--gpu-memory-utilization", "0.1", "--max-model-len",
)  # fmt: skip


@dataclass
class Server:
    """A server that was started; it answers after `wait_ready`."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    started: float

    @property
    def load_seconds(self) -> float:
        """What vLLM's log says of loading the weights; 0 before it says so."""
        found = _LOADING.search(self.log.read_text())
        return float(found[1]) if found else 0.0

    @property
    def gpu_gib(self) -> float:
        """What vLLM's log says of the GPU's memory after loading."""
        found = _RESIDENT.search(self.log.read_text())
        return float(found[1]) if found else 0.0

    @property
    def kernels(self) -> list[str]:
        """The kernels of linear layers that the log names."""
        return sorted({found[1] or found[2] for found in _KERNEL.finditer(self.log.read_text())})

    def wait_loaded(self) -> None:
        """Until the weights are loaded. Raises RuntimeError with the end of the log when the server does not start."""
        self._wait(lambda: bool(_LOADING.search(self.log.read_text())))

    def wait_ready(self) -> None:
        """Until it answers. Raises as `wait_loaded`."""
        self._wait(lambda: _answers(f"{self.url}/health"))

    def _wait(self, there: Callable[[], bool]) -> None:
        while not there():
            if self.process.poll() is not None or time.monotonic() - self.started > _START_SECONDS:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)

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

    @property
    def engine(self) -> int:
        """The process with the weights: the one with most memory of its own."""
        return max(self.processes, key=_anonymous)

    def anonymous_bytes(self) -> int:
        """Memory of the engine that is no file's: weights, cache and all else."""
        return _anonymous(self.engine)

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
    """Start `vllm serve` for a folder, without what `GAMMA_CPU_ISA` hides; then its cache lies beside the log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = [str(Path(sys.executable).parent / "vllm")]
    hiding: dict[str, str] = {}
    if hidden_flags():
        program = [sys.executable, "-P", str(Path(__file__).with_name("avx2_server.py"))]
        # What was compiled for the whole processor must not be found.
        hiding = HIDING | {"VLLM_CACHE_ROOT": str(log.parent / "cache-avx2")}
    command = [
        *program, "serve", str(folder), *_OPTIONS, str(max_model_len), "--port", str(port), *flags,
    ]  # fmt: skip
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"} | os.environ
    environment |= {"VLLM_LOGGING_LEVEL": "INFO"}
    environment |= hiding | (variables or {})
    environment.pop("OMP_WAIT_POLICY", None)  # threads wait as vLLM's do by default, whatever the Makefile says
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    return Server(process, f"http://127.0.0.1:{port}", log, time.monotonic())


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
