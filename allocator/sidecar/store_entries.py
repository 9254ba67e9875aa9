"""The entries of the store as the service knows them, read anew at most once a second; what is wrong is said once."""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

from allocator.contract.errors import GammaError
from allocator.sidecar.backends import StoreUnreachableError
from allocator.sidecar.errors import ApiError
from allocator.sidecar.logs import Log
from allocator.sidecar.metrics import Metrics
from allocator.sidecar.store import Entry, Listing, Store

__all__ = ["StoreEntries"]

Listed = TypeVar("Listed")

_LIST_SECONDS = 1.0


class _Listing(Generic[Listed]):
    """Something read from the store anew at most once a second, in a thread; a failure counts as long."""

    def __init__(self, read: Callable[[], Listed]) -> None:
        self._read = read
        self._found: Listed | None = None
        self._failed: GammaError | None = None
        self._read_at = -_LIST_SECONDS
        self._lock = asyncio.Lock()

    async def __call__(self) -> Listed:
        if not self._recent():
            async with self._lock:
                if not self._recent():
                    try:
                        self._found, self._failed = await asyncio.to_thread(self._read), None
                    except GammaError as error:
                        self._found, self._failed = None, error
                    self._read_at = time.monotonic()
        if self._failed is not None:
            raise type(self._failed)(str(self._failed))
        assert self._found is not None
        return self._found

    def _recent(self) -> bool:
        return time.monotonic() - self._read_at < _LIST_SECONDS


class StoreEntries:
    """The entries of the store, and what was measured with their scores."""

    def __init__(self, store: Store, metrics: Metrics, log: Log) -> None:
        self._store, self._metrics, self._log = store, metrics, log
        self._unreadable: dict[str, str] = {}
        self.was_read = False
        self.problem: str | None = None
        self._listed = _Listing(self._list)
        self._measured: dict[str, _Listing[list[str]]] = {}

    @property
    def remarks(self) -> str:
        """What is wrong with the store while the service can be used; empty if nothing is."""
        if self.problem is not None:
            return self.problem
        return "; ".join(f"left out, cannot be read: {reason}" for reason in self._unreadable.values())

    async def all(self) -> list[Entry]:
        """All entries, the newest last."""
        return (await self._listed())[0]

    async def measured(self, entry: Entry) -> list[str]:
        """Digests of the stored manifests of the entry's scores that say what was measured."""
        read = partial(self._store.measured, entry.scores_digest)
        return await self._measured.setdefault(entry.scores_digest, _Listing(read))()

    def _list(self) -> tuple[list[Entry], dict[str, Entry]]:
        listing = self._read()
        entries = listing.entries
        by_key = {key: e for e in entries for key in (e.name, e.model.digest)}
        return entries, by_key | {e.scores_digest: e for e in entries}

    def _read(self) -> Listing:
        """The store's list; what changed about it since the last time is logged."""
        try:
            listing = self._store.listing()
            if not listing.files:
                self._store.check()  # an empty list may be a folder that is gone
        except GammaError as error:
            if self.problem is None:
                self._log("error", "store cannot be read", reason=str(error))
            self.problem = str(error)
            self._metrics.store_reachable.set(0)
            raise StoreUnreachableError(str(error)) from None
        if self.problem is not None:
            self._log("info", "store can be read again", store=self._store.url)
        self.problem, self.was_read = None, True
        self._metrics.store_reachable.set(1)
        for path, reason in listing.unreadable.items():
            if self._unreadable.get(path) != reason:
                self._log("error", "entry of the store left out, cannot be read", entry=path, reason=reason)
        self._unreadable = listing.unreadable
        self._metrics.unreadable_entries.set(len(listing.unreadable))
        return listing

    async def find(self, model: str) -> Entry:
        """The newest entry of a name or digest. Raises ApiError 404."""
        _entries, by_key = await self._listed()
        entry = by_key.get(model)
        if entry is None:
            raise ApiError(404, f"the store has no scores of {model!r}; GET /v1/models lists what there is", "model")
        return entry
