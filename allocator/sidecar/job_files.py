"""A job as files of the store, so that it outlives the service and several services share it.

    jobs/<hex>/request.json    what is asked for, created once
    jobs/<hex>/claim-<n>.json  who makes attempt n: created by one service only, however many try
    jobs/<hex>/cancel-<n>.json empty: attempt n is to end, wherever it is made
    jobs/<hex>/state.json      what the claimant says of it, and when it said so last

A claimant that died is known at once on its own machine (its process is gone), elsewhere when it has been silent for
a while; then another service claims the next attempt.
"""

import json
import os
import re
import socket
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import Field, ValidationError

from allocator.contract.digest import digest_json
from allocator.contract.documents import Digest, Strict
from allocator.run.progress import Standing
from allocator.sidecar.schemas import Job, JobState
from allocator.sidecar.store import Store, hex_of

__all__ = ["JobFiles", "JobRecord", "JobRequest", "Owner", "now_text"]

AnyPart = TypeVar("AnyPart", bound=Strict)

_SILENT_SECONDS = 60.0
_CLAIM = re.compile(r"claim-([0-9]{6})\.json")


class JobRequest(Strict):
    """`request.json`. `volume` names the disk that the checkpoint goes to: only services that have it take the job."""

    manifest: Digest
    scores: Digest
    volume: str
    tensor_bytes: int
    created: str

    @property
    def identity(self) -> str:
        return digest_json({"kind": "checkpoint", "manifest": self.manifest, "volume": self.volume})


@dataclass(frozen=True)
class Owner:
    """One running process, told apart from every other one that had its number."""

    host: str
    boot: str
    namespace: str
    pid: int
    started: str

    @classmethod
    def me(cls) -> "Owner":
        pid = os.getpid()
        return cls(socket.gethostname(), _read("/proc/sys/kernel/random/boot_id"), _namespace(), pid, _started(pid))

    def gone(self, me: "Owner") -> bool:
        """Whether the process has ended; False when that cannot be seen from here."""
        same = (self.host, self.boot, self.namespace) == (me.host, me.boot, me.namespace)
        return same and (not self.started or _started(self.pid) != self.started)


class _Claim(Strict):
    claimed: float
    host: str
    boot: str
    namespace: str
    pid: int
    started: str


class _State(Strict):
    attempt: int
    state: JobState
    step: str = ""
    progress: float = Field(default=0.0, ge=0, le=1)
    standing: Standing | None = None
    checkpoint: str | None = None
    error: str | None = None
    updated: float


@dataclass(frozen=True)
class JobRecord:
    """All of a job as the store has it. `attempt` is the highest claimed; `abandoned`: its claimant has ended."""

    request: JobRequest
    attempt: int
    job: Job
    abandoned: bool

    @property
    def open(self) -> bool:
        """Whether somebody may claim the next attempt."""
        return self.job.state == "queued" or self.abandoned


class JobFiles:
    """Reads and writes the jobs of a store as process `owner`."""

    def __init__(self, store: Store, owner: Owner) -> None:
        self._backend, self._owner = store.backend, owner

    def ids(self) -> list[str]:
        return [f"sha256:{name}" for name in self._backend.names("jobs") if re.fullmatch("[0-9a-f]{64}", name)]

    def create(self, request: JobRequest) -> None:
        self._backend.create(f"{_at(request.identity)}/request.json", request.model_dump_json().encode())

    def read(self, identity: str) -> JobRecord | None:
        """None if there is no such job, or its request is damaged."""
        at = _at(identity)
        content = self._backend.read(f"{at}/request.json")
        request = None if content is None else _parsed(JobRequest, content)
        if request is None:
            return None
        claims = [int(m[1]) for name in self._backend.names(at) if (m := _CLAIM.fullmatch(name))]
        attempt = max(claims, default=0)
        content = self._backend.read(f"{at}/state.json")
        state = None if content is None else _parsed(_State, content)
        if attempt and (state is None or state.attempt != attempt):
            state = _State(attempt=attempt, state="running", updated=0.0 if state is None else state.updated)
        running = attempt > 0 and state is not None and state.state == "running"
        abandoned = running and state is not None and self._is_dead(at, attempt, state.updated)
        return JobRecord(request, attempt, _job(identity, request, attempt, state, abandoned), abandoned)

    def claim(self, identity: str, attempt: int) -> bool:
        """Whether attempt `attempt` is ours now."""
        content = json.dumps(asdict(self._owner) | {"claimed": time.time()}).encode()
        path = f"{_at(identity)}/claim-{attempt:06d}.json"
        # Object storage may be asked twice when an answer got lost: then what is there already is ours.
        return self._backend.create(path, content) or self._backend.read(path) == content

    def write(self, job: Job) -> None:
        """Say how an attempt of ours stands."""
        state = _State(
            attempt=job.attempt, state=job.state, step=job.step, progress=job.progress, standing=job.standing,
            checkpoint=job.checkpoint, error=job.error, updated=time.time(),
        )  # fmt: skip
        self._backend.replace(f"{_at(job.id)}/state.json", state.model_dump_json().encode())

    def ask_to_cancel(self, identity: str, attempt: int) -> None:
        """Tell the service that makes attempt `attempt`, which looks for it with each word it writes."""
        self._backend.create(f"{_at(identity)}/cancel-{attempt:06d}.json", b"")

    def cancel_asked(self, identity: str, attempt: int) -> bool:
        return self._backend.exists(f"{_at(identity)}/cancel-{attempt:06d}.json")

    def delete(self, identity: str) -> None:
        """Forget a job. The request goes first: without it nobody takes the job up."""
        at = _at(identity)
        self._backend.delete(f"{at}/request.json")
        for name in self._backend.names(at):
            self._backend.delete(f"{at}/{name}")

    def _is_dead(self, at: str, attempt: int, updated: float) -> bool:
        content = self._backend.read(f"{at}/claim-{attempt:06d}.json")
        claim = None if content is None else _parsed(_Claim, content)
        if claim is None:
            return True
        owner = Owner(**claim.model_dump(exclude={"claimed"}))
        if owner == self._owner:
            return False
        if owner.gone(self._owner):
            return True
        same = (owner.host, owner.boot, owner.namespace) == (
            self._owner.host, self._owner.boot, self._owner.namespace,
        )  # fmt: skip
        return not same and time.time() - max(updated, claim.claimed) > _SILENT_SECONDS


def now_text(seconds: float | None = None) -> str:
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _job(identity: str, request: JobRequest, attempt: int, state: _State | None, abandoned: bool) -> Job:
    if state is None or abandoned:
        return Job(
            id=identity, state="queued", manifest_digest=request.manifest, attempt=attempt,
            tensor_bytes=request.tensor_bytes, created=request.created,
            updated=request.created if state is None else now_text(state.updated),
        )  # fmt: skip
    return Job(
        id=identity, state=state.state, manifest_digest=request.manifest, step=state.step, progress=state.progress,
        standing=state.standing, attempt=attempt, checkpoint=state.checkpoint, tensor_bytes=request.tensor_bytes,
        error=state.error, created=request.created, updated=now_text(state.updated),
    )  # fmt: skip


def _at(identity: str) -> str:
    return f"jobs/{hex_of(identity)}"


def _parsed(kind: type[AnyPart], content: bytes) -> AnyPart | None:
    try:
        return kind.model_validate_json(content)
    except ValidationError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When process `pid` started, in clock ticks since boot; empty if there is none."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in ("Z", "X") else ""
