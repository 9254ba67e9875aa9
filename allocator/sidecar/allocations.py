"""Allocations: the same request has the same id and the same answer, from memory, from the store, or solved now."""

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Generic, TypeVar

from allocator import __version__
from allocator.contract.digest import digest_bytes, digest_json
from allocator.contract.errors import GammaError
from allocator.sidecar.dispatch import Solved, Task
from allocator.sidecar.entry import Entry
from allocator.sidecar.errors import ApiError, of_gamma_error
from allocator.sidecar.metrics import Metrics
from allocator.sidecar.pool import SolverPool
from allocator.sidecar.schemas import Allocation, AllocationRequest, PlanHardware, SweepRequest
from allocator.sidecar.store import Store, hex_of

__all__ = ["Allocations", "Catalogue", "Memory"]

Listed = TypeVar("Listed")

_LIST_SECONDS = 1.0
_PARAMS = {
    "budget": "budget", "average": "average_bits", "pin": "pins", "ceiling": "ceilings", "floor": "floors",
    "smallest": "smallest", "GPU": "gpu", "--max-model-len": "max_model_len", "--kv-cache-dtype": "kv_cache_dtype",
    "--tensor-parallel-size": "tensor_parallel_size",
}  # fmt: skip
"""What an error is about, by its first word."""


class Memory:
    """The answers used last, by id, up to an amount of bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._used = most_bytes, 0
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    def get(self, key: str) -> bytes | None:
        content = self._kept.get(key)
        if content is not None:
            self._kept.move_to_end(key)
        return content

    def put(self, key: str, content: bytes) -> None:
        old = self._kept.pop(key, b"")
        self._kept[key] = content
        self._used += len(content) - len(old)
        while self._used > self._most:
            _, dropped = self._kept.popitem(last=False)
            self._used -= len(dropped)


class _Listing(Generic[Listed]):
    """Something read from the store anew at most once a second, in a thread."""

    def __init__(self, read: Callable[[], Listed]) -> None:
        self._read = read
        self._found: Listed | None = None
        self._read_at = 0.0
        self._lock = asyncio.Lock()

    async def __call__(self) -> Listed:
        found = self._recent()
        if found is None:
            async with self._lock:
                found = self._recent()
                if found is None:
                    found = self._found = await asyncio.to_thread(self._read)
                    self._read_at = time.monotonic()
        return found

    def _recent(self) -> Listed | None:
        return self._found if time.monotonic() - self._read_at < _LIST_SECONDS else None


class Catalogue:
    """The entries of the store, and what was measured with their scores."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._listed = _Listing(self._list)
        self._measured: dict[str, _Listing[list[str]]] = {}

    async def entries(self) -> list[Entry]:
        """All entries, the newest last."""
        return (await self._listed())[0]

    async def measured(self, entry: Entry) -> list[str]:
        """Digests of the stored manifests of the entry's scores that say what was measured."""
        read = partial(self._store.measured, entry.scores_digest)
        return await self._measured.setdefault(entry.scores_digest, _Listing(read))()

    def _list(self) -> tuple[list[Entry], dict[str, Entry]]:
        entries = self._store.entries()
        by_key = {key: e for e in entries for key in (e.name, e.model.digest)}
        return entries, by_key | {e.scores_digest: e for e in entries}

    async def find(self, model: str) -> Entry:
        """The newest entry of a name or digest. Raises ApiError 404."""
        _entries, by_key = await self._listed()
        entry = by_key.get(model)
        if entry is None:
            raise ApiError(404, f"the store has no scores of {model!r}; GET /v1/models lists what there is", "model")
        return entry


class Allocations:
    """Answers requests; solves only what neither memory nor the store has, and each request once at a time."""

    def __init__(
        self, store: Store, catalogue: Catalogue, pool: SolverPool, metrics: Metrics, memory_bytes: int
    ) -> None:
        self._store, self._catalogue, self._pool, self._metrics = store, catalogue, pool, metrics
        self._memory = Memory(memory_bytes)
        self._flying: dict[str, asyncio.Task[bytes]] = {}

    async def allocate(self, request: AllocationRequest, persist: bool) -> bytes:
        """The JSON of the allocation. `persist`: also into the store. Raises ApiError and GammaError."""
        entry = await self._catalogue.find(request.model)
        identity = _identity("allocation", request.model_dump(mode="json"), entry)
        known = self._memory.get(identity)
        if known is not None and (not persist or self._memory.get(f"stored {identity}") is not None):
            return known

        plan = None if request.plan is None else await self.plan(request.plan, entry)

        async def solve() -> bytes:
            stored = await asyncio.to_thread(self._store.backend.read, f"allocations/{hex_of(identity)}.json")
            if stored is not None:
                self._remember(identity, stored, None, True)
                return stored
            solved: Solved = await self._solve(
                "allocate", identity, request.model_dump_json(), entry.model_dump_json(),
                plan, persist, self._pool.seconds,
            )  # fmt: skip
            self._metrics.solve_seconds.observe(solved.seconds)
            self._metrics.solve_gap.observe(solved.gap_ratio)
            self._metrics.solves_cut.inc(solved.cut)
            self._remember(identity, solved.allocation, solved.manifest, persist)
            return solved.allocation

        return await self._once(f"{identity} {persist}", solve)

    async def plan(self, hardware: PlanHardware, entry: Entry, manifest: bytes | None = None) -> dict[str, Any]:
        """What the hardware leaves for the weights, or with `manifest` (its file) for the KV cache.

        Raises ApiError 400 for what vLLM would refuse.
        """
        chosen = PlanHardware(**hardware.model_dump(exclude={"model", "manifest"}))
        request = chosen.model_dump(mode="json") | ({"manifest": digest_bytes(manifest)} if manifest else {})
        key = _identity("plan", request, entry)
        content = self._memory.get(key)
        if content is not None:
            return dict(json.loads(content))
        made: dict[str, Any] = await self._solve("plan", entry.model_dump_json(), chosen.model_dump_json(), manifest)
        self._memory.put(key, json.dumps(made).encode())
        return made

    async def allocation(self, identity: str) -> bytes:
        """An allocation made before. Raises ApiError 404."""
        known = self._memory.get(identity)
        if known is None:
            known = await asyncio.to_thread(self._store.backend.read, f"allocations/{hex_of(identity)}.json")
            if known is None:
                raise ApiError(404, f"there is no allocation {identity}; POST /v1/allocations makes one", "id")
            self._remember(identity, known, None, True)
        return known

    async def manifest(self, identity: str) -> bytes:
        """The manifest file of an allocation, as `gamma solve --out` writes it. Raises ApiError 404."""
        allocation = Allocation.model_validate_json(await self.allocation(identity))
        return await self.manifest_text(allocation.manifest_digest)

    async def manifest_text(self, digest: str) -> bytes:
        """A manifest by its own digest. Raises ApiError 404."""
        text = self._memory.get(digest)
        if text is None:
            text = await asyncio.to_thread(self._store.manifest_text, digest)
            if text is None:
                raise ApiError(404, f"there is no manifest {digest}", "id")
            self._memory.put(digest, text)
        return text

    async def sweep(self, request: SweepRequest) -> bytes:
        """The JSON of the Pareto curve. Its id counts what was measured: a new manifest makes another answer."""
        entry = await self._catalogue.find(request.model)
        measured = await self._catalogue.measured(entry)
        identity = _identity("sweep", request.model_dump(mode="json") | {"measured": measured}, entry)
        known = self._memory.get(identity)
        if known is not None:
            return known

        async def solve() -> bytes:
            content: bytes = await self._solve(
                "sweep", identity, request.model_dump_json(), entry.scores_digest, entry.name, measured
            )
            self._memory.put(identity, content)
            return content

        return await self._once(identity, solve)

    async def _solve(self, task: Task, *arguments: object) -> Any:
        try:
            return await self._pool.run(task, *arguments)
        except GammaError as error:
            raise of_gamma_error(error, _PARAMS.get(str(error).partition(" ")[0])) from None

    def _remember(self, identity: str, allocation: bytes, manifest: bytes | None, stored: bool) -> None:
        self._memory.put(identity, allocation)
        if stored:
            self._memory.put(f"stored {identity}", b"1")
        if manifest is not None:
            self._memory.put(Allocation.model_validate_json(allocation).manifest_digest, manifest)

    async def _once(self, key: str, make: Callable[[], Awaitable[bytes]]) -> bytes:
        """Requests for one key at the same time share one run; a caller that leaves does not end it for the others."""
        task = self._flying.get(key)
        if task is None:
            task = asyncio.ensure_future(make())
            self._flying[key] = task
            task.add_done_callback(lambda done: self._end(key, done))
        return await asyncio.shield(task)

    def _end(self, key: str, task: asyncio.Task[bytes]) -> None:
        self._flying.pop(key, None)
        if not task.cancelled():
            task.exception()  # seen, also when nobody waits any more


def _identity(kind: str, request: dict[str, object], entry: Entry) -> str:
    """The release counts: another one may plan or solve otherwise. The model counts by what it was resolved to."""
    bound = {"model": entry.name, "scores": entry.scores_digest, "release": __version__}
    return digest_json({"kind": kind, "request": request | bound})
