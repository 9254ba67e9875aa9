"""The parts of one running service, made once and handed to the routes."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from allocator.sidecar.allocations import Allocations, Catalogue
from allocator.sidecar.jobs import Jobs
from allocator.sidecar.logs import Log
from allocator.sidecar.metrics import Metrics
from allocator.sidecar.node import Node
from allocator.sidecar.pool import SolverPool
from allocator.sidecar.settings import ServiceSettings
from allocator.sidecar.store import Store
from allocator.sidecar.tokens import Tokens
from allocator.sidecar.tracing import Tracing

__all__ = ["Service"]


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
    catalogue: Catalogue
    allocations: Allocations
    jobs: Jobs
    node: Node
    _background: list[asyncio.Task[None]] = field(default_factory=list)

    @classmethod
    def of(cls, settings: ServiceSettings) -> "Service":
        """Raises InputError for a store, a token file or a folder that cannot be used."""
        store, log, metrics = Store(settings.store), Log(settings.log_level), Metrics()
        tracing = Tracing(log)
        tokens = Tokens(settings.token_files) if settings.token_files else None
        pool = SolverPool(store.url, settings.solvers, settings.solver_queue, settings.solver_seconds, log, tracing)
        catalogue = Catalogue(store)
        allocations = Allocations(store, catalogue, pool, metrics, settings.memory_bytes)
        jobs = Jobs(store, _checkpoint_folder(settings, store), settings.job_queue, metrics, log)
        node = Node(settings, metrics, log)
        return cls(settings, store, log, metrics, tracing, tokens, pool, catalogue, allocations, jobs, node)

    async def start(self) -> None:
        self._background.append(asyncio.create_task(self.pool.warm()))
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


def _checkpoint_folder(settings: ServiceSettings, store: Store) -> Path | None:
    if settings.read_only:
        return None
    if settings.checkpoints is not None:
        return settings.checkpoints.absolute()
    return None if store.backend.folder is None else store.backend.folder / "checkpoints"
