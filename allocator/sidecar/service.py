"""The parts of one running service, made once and handed to the routes."""

import asyncio
import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from allocator.contract.errors import GammaError
from allocator.sidecar.allocations import Allocations
from allocator.sidecar.backends import StoreUnreachableError
from allocator.sidecar.jobs import Jobs
from allocator.sidecar.logs import Log
from allocator.sidecar.metrics import Metrics
from allocator.sidecar.node import Node
from allocator.sidecar.pool import SolverPool
from allocator.sidecar.settings import ServiceSettings
from allocator.sidecar.store import Store
from allocator.sidecar.store_entries import StoreEntries
from allocator.sidecar.tokens import Tokens
from allocator.sidecar.tracing import Tracing

__all__ = ["Service"]

_STORE_SECONDS = 15.0
_AGAIN_SECONDS = 2.0
_TOKEN_SECONDS = 1.0


@dataclass(frozen=True)
class Service:
    """`Service.of(settings)` starts nothing that computes; `start` does, inside the event loop."""

    settings: ServiceSettings
    store: Store
    log: Log
    metrics: Metrics
    tracing: Tracing
    tokens: Tokens | None
    pool: SolverPool
    entries: StoreEntries
    allocations: Allocations
    jobs: Jobs
    node: Node
    _background: list[asyncio.Task[None]] = field(default_factory=list)

    @classmethod
    def of(cls, settings: ServiceSettings) -> "Service":
        """Raises InputError for a store that is not there, a token file or a folder that cannot be used.

        A storage that does not answer at the moment is waited for: `ready` says so.
        """
        store, log, metrics = Store(settings.store), Log(settings.log_level), Metrics()
        with contextlib.suppress(StoreUnreachableError):  # the watch says so, and when it is back
            store.check()
        tracing = Tracing(log)
        tokens = Tokens(settings.token_files) if settings.token_files else None
        pool = SolverPool(store.url, settings.solvers, settings.solver_queue, settings.solver_seconds, log, tracing)
        entries = StoreEntries(store, metrics, log)
        allocations = Allocations(store, entries, pool, metrics, settings.memory_bytes)
        jobs = Jobs(store, _checkpoint_folder(settings, store), settings.job_queue, metrics, log)
        node = Node(settings, metrics, log)
        return cls(settings, store, log, metrics, tracing, tokens, pool, entries, allocations, jobs, node)

    async def start(self) -> None:
        self._background.append(asyncio.create_task(self.pool.warm()))
        self._background.append(asyncio.create_task(self._watch_store()))
        if self.tokens is not None:
            self._background.append(asyncio.create_task(self._watch_tokens(self.tokens)))
        self.jobs.start()
        self.node.start()
        self.log("info", "ready", store=self.store.url, read_only=self.settings.read_only)

    async def close(self) -> None:
        for task in self._background:
            task.cancel()
        await self.node.close()
        await self.jobs.close()
        self.pool.close()
        await asyncio.to_thread(self.tracing.close)

    @property
    def not_ready(self) -> str | None:
        """Why the service cannot be used yet. A store that goes away later is a metric: the pod serves without it."""
        if not self.node.ready:
            return self.node.status.message or f"{self.node.status.state}: {self.node.status.step}"
        if self.settings.node is None and not self.entries.was_read:
            return self.entries.problem or "the store has not been read yet"
        return None

    async def _watch_store(self) -> None:
        """Reads the list of entries now and then, so that log, metrics and readiness do not wait for a request."""
        while True:
            with contextlib.suppress(GammaError, OSError):
                await self.entries.all()
            await asyncio.sleep(_STORE_SECONDS if self.entries.problem is None else _AGAIN_SECONDS)

    async def _watch_tokens(self, tokens: Tokens) -> None:
        told: dict[Path, str] = {}
        while True:
            tokens.look()
            problems = dict(tokens.problems)
            for path, reason in problems.items():
                if told.get(path) != reason:
                    self.log("error", "token file cannot be used, its tokens are refused", reason=reason)
            for path in told.keys() - problems.keys():
                self.log("info", "token file can be used again", path=path)
            told = problems
            self.metrics.unusable_token_files.set(len(problems))
            await asyncio.sleep(_TOKEN_SECONDS)


def _checkpoint_folder(settings: ServiceSettings, store: Store) -> Path | None:
    if settings.read_only:
        return None
    if settings.checkpoints is not None:
        return settings.checkpoints.absolute()
    return None if store.backend.folder is None else store.backend.folder / "checkpoints"
