"""Allocations: the same request has the same id and the same answer, from memory, from the store, or solved now."""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from allocator import __version__
from allocator.contract.amounts import parse_average_bits, parse_budget
from allocator.contract.digest import digest_bytes, digest_json
from allocator.contract.errors import GammaError
from allocator.sidecar.dispatch import Task
from allocator.sidecar.errors import ApiError, of_gamma_error
from allocator.sidecar.metrics import Metrics
from allocator.sidecar.pool import SolverPool
from allocator.sidecar.schemas import (
    Allocation,
    AllocationRequest,
    DiffRequest,
    FitRequest,
    OfAllocation,
    PlanHardware,
    SweepRequest,
)
from allocator.sidecar.solved import Solved
from allocator.sidecar.store import Entry, Store, hex_of
from allocator.sidecar.store_entries import StoreEntries

__all__ = ["Allocations", "Memory"]

_PARAMS = {
    "budget": "budget", "average": "average_bits", "pin": "pins", "ceiling": "ceilings", "floor": "floors",
    "smallest": "smallest", "GPU": "gpu", "--max-model-len": "max_model_len", "--kv-cache-dtype": "kv_cache_dtype",
    "--tensor-parallel-size": "tensor_parallel_size", "gpu_memory": "gpu_memory", "largest": "largest",
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

    def drop(self, key: str) -> None:
        self._used -= len(self._kept.pop(key, b""))

    def put(self, key: str, content: bytes) -> None:
        old = self._kept.pop(key, b"")
        self._kept[key] = content
        self._used += len(content) - len(old)
        while self._used > self._most:
            _, dropped = self._kept.popitem(last=False)
            self._used -= len(dropped)


class Allocations:
    """Answers requests; solves only what neither memory nor the store has, and each request once at a time."""

    def __init__(
        self, store: Store, entries: StoreEntries, pool: SolverPool, metrics: Metrics, memory_bytes: int
    ) -> None:
        self._store, self._entries, self._pool, self._metrics = store, entries, pool, metrics
        self._memory = Memory(memory_bytes)  # keys say what they are of: an id of one kind finds none of another
        self._flying: dict[str, asyncio.Task[bytes]] = {}

    async def allocate(self, request: AllocationRequest, persist: bool) -> bytes:
        """The JSON of the allocation. `persist`: also into the store. Raises ApiError and GammaError."""
        entry = await self._entries.find(request.model)
        request = _in_bytes(request)
        identity = _identity("allocation", request.model_dump(mode="json"), entry)
        known = self._memory.get(f"allocation {identity}")
        if known is not None and (not persist or self._memory.get(f"stored {identity}") is not None):
            return known

        plan = None if request.plan is None else await self.plan(request.plan, entry, within="plan.")

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

    async def allocate_whole(self, request: AllocationRequest, persist: bool = False) -> tuple[bytes, bytes]:
        """The JSON of the allocation, and its manifest as `gamma solve --out` writes it, wherever it was solved."""
        content = await self.allocate(request, persist)
        allocation = Allocation.model_validate_json(content)
        try:
            return content, await self.manifest_text(allocation.manifest_digest)
        except ApiError:  # the memory has dropped it, and it is not kept
            self._memory.drop(f"allocation {allocation.id}")
            content = await self.allocate(request, persist)
            allocation = Allocation.model_validate_json(content)
            return content, await self.manifest_text(allocation.manifest_digest)

    async def fit(self, request: FitRequest) -> bytes:
        """The JSON of a `Fit`. Raises ApiError and GammaError."""
        entry = await self._entries.find(request.model)
        plan = await self.plan(request.hardware, entry, within="hardware.")
        chosen: dict[str, Any] = {"model": request.model, "fusion": request.fusion}
        if request.budget is not None:
            chosen["budget"] = request.budget
        elif plan["verdict"]["fits"]:
            chosen["plan"] = request.hardware
        else:
            chosen["budget"] = str(entry.feasible_bytes[0])
        allocation, manifest = await self.allocate_whole(AllocationRequest(**chosen))
        planned = await self.plan(request.hardware, entry, manifest)
        whole = json.loads(allocation) | {"manifest": manifest.decode()}
        return json.dumps({"object": "fit", "plan": plan, "allocation": whole, "planned": planned}).encode()

    async def plan(
        self, hardware: PlanHardware, entry: Entry, manifest: bytes | None = None, within: str = ""
    ) -> dict[str, Any]:
        """What the hardware leaves for the weights, or with `manifest` (its file) for the KV cache.

        `within` is where the hardware stands in the request, for errors. Raises ApiError 400 for what vLLM would
        refuse.
        """
        chosen = PlanHardware(**hardware.model_dump(exclude={"model", "manifest"}))
        request = chosen.model_dump(mode="json") | ({"manifest": digest_bytes(manifest)} if manifest else {})
        key = f"plan {_identity('plan', request, entry)}"
        content = self._memory.get(key)
        if content is not None:
            return dict(json.loads(content))
        made: dict[str, Any]
        try:
            made = await self._solve("plan", entry.model_dump_json(), chosen.model_dump_json(), manifest)
        except ApiError as error:
            error.param = error.param and within + error.param
            raise
        self._memory.put(key, json.dumps(made).encode())
        return made

    async def allocation(self, identity: str) -> bytes:
        """An allocation made before. Raises ApiError 404."""
        known = self._memory.get(f"allocation {identity}")
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
        text = self._memory.get(f"manifest {digest}")
        if text is None:
            text = await asyncio.to_thread(self._store.manifest_text, digest)
            if text is None:
                raise ApiError(404, f"there is no manifest {digest}", "id")
            self._memory.put(f"manifest {digest}", text)
        return text

    async def sweep(self, request: SweepRequest) -> bytes:
        """The JSON of the Pareto curve. Its id counts what was measured: a new manifest makes another answer."""
        entry = await self._entries.find(request.model)
        measured = await self._entries.measured(entry)
        identity = _identity("sweep", request.model_dump(mode="json") | {"measured": measured}, entry)
        known = self._memory.get(f"sweep {identity}")
        if known is not None:
            return known

        async def solve() -> bytes:
            content: bytes = await self._solve(
                "sweep", identity, request.model_dump_json(), entry.scores_digest, entry.name, measured
            )
            self._memory.put(f"sweep {identity}", content)
            return content

        return await self._once(identity, solve)

    async def diff(self, request: DiffRequest) -> bytes:
        """The JSON of what changed. Raises ApiError and GammaError."""
        sides = [await self._side(side, name) for name, side in (("before", request.before), ("after", request.after))]
        return json.dumps(await self._pool.run("diff", *sides)).encode()

    async def _side(self, side: str | OfAllocation | dict[str, Any], name: str) -> bytes | dict[str, Any]:
        """A manifest by digest or request as its text: what was not kept is known to this process only."""
        if isinstance(side, dict):
            return side
        try:
            if isinstance(side, OfAllocation):
                return (await self.allocate_whole(side.allocation))[1]
            return await self.manifest_text(side)
        except ApiError as error:
            error.param = name
            raise

    def forget(self, kind: str, digest: str) -> None:
        """An allocation or a manifest that was deleted from the store."""
        self._memory.drop(f"{kind} {digest}")
        self._memory.drop(f"stored {digest}")

    async def _solve(self, task: Task, *arguments: object) -> Any:
        try:
            return await self._pool.run(task, *arguments)
        except GammaError as error:
            raise of_gamma_error(error, _param_of(str(error))) from None

    def _remember(self, identity: str, allocation: bytes, manifest: bytes | None, stored: bool) -> None:
        self._memory.put(f"allocation {identity}", allocation)
        if stored:
            self._memory.put(f"stored {identity}", b"1")
        if manifest is not None:
            digest = Allocation.model_validate_json(allocation).manifest_digest
            self._memory.put(f"manifest {digest}", manifest)

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


def _param_of(message: str) -> str | None:
    first, _, rest = message.partition(" ")
    return "average_bits" if rest.startswith("average bits") else _PARAMS.get(first)


def _in_bytes(request: AllocationRequest) -> AllocationRequest:
    """The request with its amount in bytes, or as average bits: the same in other words is one request."""
    if request.budget is None:
        return request
    try:
        bits = parse_average_bits(request.budget)
        if bits is not None:
            return request.model_copy(update={"budget": None, "average_bits": bits})
        return request.model_copy(update={"budget": str(parse_budget(request.budget))})
    except GammaError as error:
        raise of_gamma_error(error, "budget") from None


def _identity(kind: str, request: dict[str, object], entry: Entry) -> str:
    """The release counts: another one may plan or solve otherwise. The model counts by what it was resolved to."""
    bound = {"model": entry.name, "scores": entry.scores_digest, "release": __version__}
    return digest_json({"kind": kind, "request": request | bound})
