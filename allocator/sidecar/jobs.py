"""Makes checkpoints in the background: a bounded queue, one process at a time, and every step in the store."""

import asyncio
import contextlib
import shutil
import subprocess
import time
import uuid
from collections import Counter
from pathlib import Path

from allocator.contract.checkpoint import check_checkpoint
from allocator.contract.errors import ContractError, GammaError, InputError, StoppedError
from allocator.run.progress import Standing, Tracker
from allocator.sidecar.backends import FolderBackend
from allocator.sidecar.errors import ApiError
from allocator.sidecar.job_files import JobFiles, JobRecord, JobRequest, Owner, now_text
from allocator.sidecar.logs import Log
from allocator.sidecar.materialise import materialise
from allocator.sidecar.metrics import Metrics
from allocator.sidecar.schemas import Job
from allocator.sidecar.store import Store, hex_of

__all__ = ["Jobs"]

_BEAT_SECONDS = 1.0
_LOOK_SECONDS = 15.0
_MOST_ATTEMPTS = 5
_RETRY_AFTER = "5"


class Jobs:
    """The jobs of this service. `folder` gets the checkpoints, each under the hex of its manifest.

    At most `queue` jobs wait or run at once; more are answered with 429. Jobs that another service left behind are
    taken over.
    """

    def __init__(self, store: Store, folder: Path | None, queue: int, metrics: Metrics, log: Log) -> None:
        self._store, self._folder, self._most = store, folder, queue
        self._metrics, self._log = metrics, log
        self._files = JobFiles(store, Owner.me())
        self._here: dict[str, Job] = {}
        self._waiting: asyncio.Queue[JobRecord] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._process: subprocess.Popen[str] | None = None
        self._closing = False
        self._cancelled: set[str] = set()
        self._volume = "" if folder is None else _volume_of(folder)

    def start(self) -> None:
        """Begin to work, and to look for jobs that were left behind."""
        if self._folder is not None:
            self._tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._look())]

    async def close(self) -> None:
        """Stop; a running job is taken up again by the next start."""
        self._closing = True
        if self._process is not None:
            self._process.kill()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def submit(self, manifest_digest: str) -> Job:
        """The job that makes the checkpoint of a stored manifest. Raises ApiError 404, 429, 503."""
        if self._folder is None:
            raise ApiError(503, "this service has no folder for checkpoints; start it with --checkpoints DIR")
        manifest = await asyncio.to_thread(self._store.manifest, manifest_digest)
        if manifest is None:
            raise ApiError(404, f"there is no manifest {manifest_digest} in the store", "manifest")
        request = JobRequest(
            manifest=manifest_digest, scores=manifest.scores_digest or manifest_digest, volume=self._volume,
            tensor_bytes=manifest.tensor_bytes, created=now_text(),
        )  # fmt: skip
        identity = request.identity
        if identity in self._here and self._here[identity].state in ("queued", "running"):
            return self._here[identity]
        record = await asyncio.to_thread(self._files.read, identity)
        if record is not None and self._stands(record):
            return record.job
        active = sum(job.state in ("queued", "running") for job in self._here.values())
        if active >= self._most:
            message = f"{active} checkpoints are waiting or being made; try again"
            raise ApiError(429, message, headers={"Retry-After": _RETRY_AFTER})
        await asyncio.to_thread(self._files.create, request)
        record = await asyncio.to_thread(self._files.read, identity)
        if record is None:
            raise ApiError(503, "the store does not keep the job; try again", headers={"Retry-After": _RETRY_AFTER})
        if self._stands(record):  # another service was quicker
            return record.job
        return self._enqueue(record)

    def _stands(self, record: JobRecord) -> bool:
        """Whether the job needs nobody: it is being made, or is made and still there."""
        if record.job.state == "running":
            return not record.abandoned
        return record.job.state == "succeeded" and self._whole(record.request.manifest)

    async def get(self, identity: str) -> Job:
        """Raises ApiError 404."""
        if identity in self._here:
            return self._here[identity]
        record = await asyncio.to_thread(self._files.read, identity)
        if record is None:
            raise ApiError(404, f"there is no job {identity}", "id")
        return record.job

    async def page(self, most: int, after: str | None) -> tuple[list[Job], str | None]:
        """At most `most` jobs after the id `after`, and the id to go on after, None at the end."""
        ids = [one for one in await asyncio.to_thread(self._files.ids) if after is None or one > after]
        found = []
        for identity in ids[:most]:
            with contextlib.suppress(ApiError):  # deleted meanwhile
                found.append(await self.get(identity))
        return found, ids[most - 1] if len(ids) > most else None

    async def cancel(self, identity: str) -> Job:
        """End a job that waits or is made, here or by another service. Raises ApiError 404, 409 when it has ended.

        One that is being made is "running" until its process is gone.
        """
        job = await self.get(identity)
        if job.state == "cancelled":
            return job
        if job.state in ("succeeded", "failed"):
            raise ApiError(409, f"job {identity} has {job.state} already", "id")
        record = await asyncio.to_thread(self._files.read, identity)
        if record is None:
            raise ApiError(404, f"there is no job {identity}", "id")
        here = self._here.get(identity)
        if here is not None and here.state == "running":
            self._end(identity)
            return here
        if record.open and await asyncio.to_thread(self._files.claim, identity, record.attempt + 1):
            ended = record.job.model_copy(
                update={"state": "cancelled", "attempt": record.attempt + 1, "updated": now_text(time.time())}
            )
            await asyncio.to_thread(self._files.write, ended)
            if here is not None:
                self._here[identity] = ended
            await self._count()
            return ended
        record = await asyncio.to_thread(self._files.read, identity)
        if record is not None:
            await asyncio.to_thread(self._files.ask_to_cancel, identity, record.attempt)
        return await self.get(identity)

    async def delete(self, identity: str) -> None:
        """Forget a job that has ended; its checkpoint stays. Raises ApiError 404, 409 for one that has not."""
        job = await self.get(identity)
        if job.state in ("queued", "running"):
            raise ApiError(409, f"job {identity} is {job.state}; cancel it first", "id")
        await asyncio.to_thread(self._files.delete, identity)
        self._here.pop(identity, None)
        await self._count()

    async def _count(self) -> None:
        with contextlib.suppress(Exception):
            self._metrics.set_jobs(await self.counts())

    def _end(self, identity: str) -> None:
        """End the attempt that is made here."""
        self._cancelled.add(identity)
        if self._process is not None:
            self._process.kill()

    async def counts(self) -> dict[str, int]:
        """Number of jobs of the store by state."""
        found: Counter[str] = Counter()
        for identity in await asyncio.to_thread(self._files.ids):
            with contextlib.suppress(ApiError):
                found[(await self.get(identity)).state] += 1
        return dict(found)

    def _enqueue(self, record: JobRecord) -> Job:
        identity = record.job.id
        if identity in self._here and self._here[identity].state in ("queued", "running"):
            return self._here[identity]
        job = record.job.model_copy(
            update={"state": "queued", "error": None, "progress": 0.0, "step": "", "standing": None, "checkpoint": None}
        )
        self._here[identity] = job
        self._waiting.put_nowait(record)
        return job

    async def _look(self) -> None:
        while True:
            try:
                for identity in await asyncio.to_thread(self._files.ids):
                    record = await asyncio.to_thread(self._files.read, identity)
                    if record is not None and record.open and record.request.volume == self._volume:
                        self._enqueue(record)
                self._metrics.set_jobs(await self.counts())
            except Exception as error:  # the store may be away for a while
                self._log("warning", "jobs cannot be listed", reason=str(error))
            await asyncio.sleep(_LOOK_SECONDS)

    async def _work(self) -> None:
        while True:
            record = await self._waiting.get()
            identity = record.job.id
            self._here.setdefault(identity, record.job)
            try:
                await self._make(record)
            except Exception as error:
                self._log("error", "job cannot be run", job=identity, reason=f"{type(error).__name__}: {error}")
            finally:
                if not self._closing:
                    job = self._here.get(identity, record.job)
                    if await self._tell(job) or job.state in ("queued", "running"):
                        self._here.pop(identity, None)
                    elif len(self._here) > 256:  # told by nobody but us, while the store cannot be written
                        self._here.pop(next(iter(self._here)))
                    self._cancelled.discard(identity)
                    await self._count()

    async def _make(self, record: JobRecord) -> None:
        request, attempt = record.request, record.attempt + 1
        identity = request.identity
        if not await asyncio.to_thread(self._files.claim, identity, attempt):
            return
        self._update(identity, state="running", attempt=attempt)
        if record.abandoned and attempt > _MOST_ATTEMPTS:
            message = f"{attempt - 1} attempts ended without a word, perhaps for lack of memory; ask again to try again"
            self._update(identity, state="failed", error=message)
            return
        self._log("info", "job started", job=identity, manifest=request.manifest, attempt=attempt)
        ended = asyncio.Event()
        beat = asyncio.create_task(self._beat(identity, ended))
        try:
            await asyncio.to_thread(self._export, request)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if identity in self._cancelled:
                await asyncio.to_thread(_clean, self._out(request.manifest))
                self._update(identity, state="cancelled", step="")
                self._log("info", "job cancelled", job=identity)
            elif not self._closing:
                reason = str(error) if isinstance(error, GammaError) else f"{type(error).__name__}: {error}"
                self._update(identity, state="failed", error=reason[:2000])
                self._log("error", "job failed", job=identity, reason=reason)
        else:
            assert self._folder is not None
            folder = str(self._folder / hex_of(request.manifest))
            self._update(identity, state="succeeded", progress=1.0, step="done", standing=None, checkpoint=folder)
            self._log("info", "job done", job=identity, checkpoint=folder)
        finally:
            self._process = None
            ended.set()  # not cancelled: a write under way would end after that of the result, and undo it
            await asyncio.gather(beat, return_exceptions=True)

    def _export(self, request: JobRequest) -> None:
        out = self._out(request.manifest)
        if self._whole(request.manifest):
            return
        manifest = self._store.manifest(request.manifest)
        if manifest is None:
            raise ContractError(f"the store has lost the manifest {request.manifest}")
        entries = [e for e in self._store.entries() if e.bank_digest == manifest.bank_digest]
        if not entries:
            raise InputError(f"the store offers no bank {manifest.bank_digest}; add it with `gamma store add`")

        def tell(standing: Standing) -> None:
            if request.identity in self._cancelled:
                raise StoppedError("cancelled")
            self._update(request.identity, step=standing.step, progress=standing.share, standing=standing)

        materialise(manifest, entries[-1], self._store, out, Tracker(tell), self._take_process)
        _config, found = check_checkpoint(out)
        if found.digest != request.manifest:
            raise ContractError(f"{out} holds manifest {found.digest}, asked for was {request.manifest}")

    def _take_process(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        if self._closing or self._cancelled:
            process.kill()

    def _out(self, manifest_digest: str) -> Path:
        assert self._folder is not None
        return self._folder / hex_of(manifest_digest)

    def _whole(self, manifest_digest: str) -> bool:
        assert self._folder is not None
        try:
            _config, found = check_checkpoint(self._folder / hex_of(manifest_digest))
        except (ContractError, InputError, OSError):
            return False
        return found.digest == manifest_digest

    def _update(self, identity: str, **changes: object) -> None:
        if changes.get("state") == "failed":
            self._metrics.job_failures.inc()
        self._here[identity] = self._here[identity].model_copy(update=changes | {"updated": now_text(time.time())})

    async def _beat(self, identity: str, ended: asyncio.Event) -> None:
        while not ended.is_set():
            job = self._here[identity]
            if await self._tell(job) and job.state == "running" and identity not in self._cancelled:
                with contextlib.suppress(OSError):
                    if await asyncio.to_thread(self._files.cancel_asked, identity, job.attempt):
                        self._end(identity)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), _BEAT_SECONDS)

    async def _tell(self, job: Job) -> bool:
        """Write the state of an attempt of ours; False when the store cannot be written."""
        if job.state == "queued":
            return True
        try:
            await asyncio.to_thread(self._files.write, job)
        except OSError as error:
            self._log("warning", "state of a job cannot be written", job=job.id, reason=str(error))
            return False
        return True


def _clean(out: Path) -> None:
    """Remove what a checkpoint that will not be made has left beside its place."""
    for left in (".sources", ".partial"):
        shutil.rmtree(out.with_name(f".{out.name}{left}"), ignore_errors=True)


def _volume_of(folder: Path) -> str:
    """The name of a disk: random, kept in the folder, the same for all services that write to it."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = FolderBackend(folder)
    backend.create(".gamma-volume", uuid.uuid4().hex.encode())
    content = backend.read(".gamma-volume")
    return content.decode("ascii", "replace").strip() if content else ""
