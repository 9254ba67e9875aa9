"""Real processes that run `gamma` and are really killed. Started from a server that has torch loaded, which is fast."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["gamma", "renames"]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["allocator.quantize", "allocator.score", "transformers.models.llama.modeling_llama"])


def gamma(*arguments: object, die_at: int | None = None, stop_at: int | None = None, log: Path | None = None) -> int:
    """Run `gamma`; returns its exit code, -9 if it was killed.

    die_at: kill it with SIGKILL at the n-th time that it renames a file into place (odd n: just before, even n: just
    after). stop_at: send it SIGTERM there. log: a file for what it prints.
    """
    process = _CONTEXT.Process(target=_run, args=([str(a) for a in arguments], die_at, stop_at, log))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def renames(log: Path) -> int:
    """How often a run that wrote `log` renamed a file into place, times two: the points at which it can be killed."""
    return int(log.read_text().rpartition("renames: ")[2])


def _run(arguments: list[str], die_at: int | None, stop_at: int | None, log: Path | None) -> None:
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    count = 0

    def counted(rename: Callable[..., Any]) -> Callable[..., Any]:
        def point() -> None:
            nonlocal count
            count += 1
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if count == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        def renamed(*names: Any) -> Any:
            point()
            result = rename(*names)
            point()
            return result

        return renamed

    os.replace, os.rename = counted(os.replace), counted(os.rename)
    import torch

    from allocator.cli.main import main

    # What torchrun gives each of its processes; the server has what was set when it started.
    torch.set_num_threads(1)
    code = main(arguments)
    print("renames:", count, flush=True)
    sys.exit(code)
