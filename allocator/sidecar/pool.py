"""A bounded pool of warm solver processes. Solvers redirect stdout and take a core each: not in the service itself."""

import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from allocator.sidecar import dispatch
from allocator.sidecar.errors import ApiError
from allocator.sidecar.logs import Log
from allocator.sidecar.tracing import Tracing

__all__ = ["SolverPool"]

_GRACE_SECONDS = 15.0


class SolverPool:
    """Runs functions of `tasks` in `processes` processes; at most `queue` calls wait, others get 429.

    `seconds` is the limit on one solve. A call that takes much longer, or whose process dies, is answered with
    503, and the processes are started anew.
    """

    def __init__(self, store_url: str, processes: int, queue: int, seconds: float, log: Log, tracing: Tracing) -> None:
        self._store_url, self._processes, self._most, self.seconds = store_url, processes, processes + queue, seconds
        self._log, self._tracing = log, tracing
        self._running = 0
        self._executor = self._start()

    async def warm(self) -> None:
        """Start the first process, so that the first request does not wait for it; others start when needed."""
        await asyncio.get_running_loop().run_in_executor(self._executor, dispatch.call, "warm")

    async def run(self, task: dispatch.Task, *arguments: Any) -> Any:
        """`tasks.<task>(*arguments)` in one of the processes. Raises ApiError, and what the function raises."""
        if self._running >= self._most:
            raise ApiError(429, f"{self._running} requests are being solved; try again", headers={"Retry-After": "1"})
        self._running += 1
        executor = self._executor
        try:
            with self._tracing.solve(task):
                call = asyncio.get_running_loop().run_in_executor(executor, dispatch.call, task, *arguments)
                waiting = self._running / self._processes + 1
                return await asyncio.wait_for(call, waiting * self.seconds + _GRACE_SECONDS)
        except BrokenProcessPool:
            self._restart(executor, "a solver process died")
            raise ApiError(503, "the solver process died; try again", headers={"Retry-After": "1"}) from None
        except TimeoutError:
            self._restart(executor, "a solver did not end in time")
            raise ApiError(503, "the solver did not end in time; ask for less", headers={"Retry-After": "1"}) from None
        finally:
            self._running -= 1

    def close(self) -> None:
        _kill(self._executor)

    def _start(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self._processes, context, initializer=dispatch.begin, initargs=(self._store_url,))

    def _restart(self, broken: ProcessPoolExecutor, reason: str) -> None:
        if broken is not self._executor:
            return
        self._log("error", "solvers restarted", reason=reason)
        self._executor = self._start()
        _kill(broken)


def _kill(executor: ProcessPoolExecutor) -> None:
    processes = list((executor._processes or {}).values())
    for process in processes:
        process.kill()
    executor.shutdown(wait=True, cancel_futures=True)
