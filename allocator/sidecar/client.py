"""A client of the service with its own schemas. Needs nothing but the standard library and pydantic.

client = Client("http://127.0.0.1:8080")
allocation = client.allocate(model="Qwen3-8B", budget="5.9GiB")
client.manifest(allocation.manifest_digest).write(Path("manifest.json"))
"""

import http.client
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from allocator.contract.documents import parse_json
from allocator.contract.errors import ContractError, GammaError, InfeasibleBudgetError, InputError
from allocator.contract.manifest import Manifest
from allocator.plan import Plan
from allocator.sidecar.schemas import (
    Allocation,
    AllocationList,
    AllocationRequest,
    CheckpointRequest,
    DiffRequest,
    Fit,
    FitRequest,
    GpuInfo,
    GpuList,
    Job,
    JobList,
    ManifestInfo,
    ManifestList,
    ModelInfo,
    ModelList,
    NodeStatus,
    PlanRequestBody,
    SweepRequest,
    SweepResult,
)

__all__ = ["Client", "ServiceError"]

AnyAnswer = TypeVar("AnyAnswer", bound=BaseModel)
AnyPage = TypeVar("AnyPage", AllocationList, JobList, ManifestList)

_MOST_WAITS = 5
_SILENCE_SECONDS = 3600


class ServiceError(GammaError):
    """An answer of the service that is no success. `kind` and `param` are those of its error object."""

    def __init__(self, status: int, kind: str, message: str, param: str | None) -> None:
        super().__init__(message + (f" ({param})" if param and param not in message else ""))
        self.status, self.kind, self.param = status, kind, param
        if kind == "infeasible_budget":
            self.exit_code = InfeasibleBudgetError.exit_code
        elif status in (409,):
            self.exit_code = ContractError.exit_code
        elif 400 <= status < 500:
            self.exit_code = InputError.exit_code


class Client:
    """Asks the service at `url` (`http://host:port`, `https://...`), with a bearer token if it needs one.

    Methods take the fields of the request and return its answer, checked. They raise ServiceError for an answer that is
    no success, InputError for fields that cannot be sent. A 429 is waited for, a few times.
    """

    def __init__(self, url: str, token: str | None = None, timeout_seconds: float = 60.0) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{url!r} is no address of a service; give http://HOST:PORT")
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._prefix, self._token, self._timeout = parts.path.rstrip("/"), token, timeout_seconds
        self.url = f"{parts.scheme}://{parts.netloc}{self._prefix}"

    def health(self) -> bool:
        """Whether the service is ready."""
        try:
            self._ask("GET", "/readyz")
        except ServiceError:
            return False
        return True

    def models(self) -> list[ModelInfo]:
        return self._parsed(ModelList, self._ask("GET", "/v1/models")).data

    def gpus(self) -> list[GpuInfo]:
        return self._parsed(GpuList, self._ask("GET", "/v1/gpus")).data

    def node(self) -> NodeStatus:
        return self._parsed(NodeStatus, self._ask("GET", "/v1/node"))

    def plan(self, **fields: Any) -> Plan:
        """Fields of `PlanRequestBody`."""
        content = self._post("/v1/plans", PlanRequestBody, fields)
        return Plan.parse(json.loads(content), f"{self.url}/v1/plans")

    def allocate(self, *, keep: bool = True, manifest: bool = False, **fields: Any) -> Allocation:
        """Fields of `AllocationRequest`. With `manifest` the answer has the manifest's text, which a service that keeps
        nothing may not know any more when it is asked again."""
        given = [f"{name}={value}" for name, value, usual in (("keep", keep, True), ("manifest", manifest, False))
                 if value is not usual]  # fmt: skip
        path = "/v1/allocations" + ("?" + "&".join(given).lower() if given else "")
        return self._parsed(Allocation, self._post(path, AllocationRequest, fields))

    def allocations(self) -> Iterator[Allocation]:
        """Those that the store keeps, by id."""
        return self._all("/v1/allocations", AllocationList)

    def manifests(self) -> Iterator[ManifestInfo]:
        """Those that the store keeps, by digest."""
        return self._all("/v1/manifests", ManifestList)

    def fit(self, **fields: Any) -> Fit:
        """Fields of `FitRequest`: plan, allocation and manifest in one answer."""
        return self._parsed(Fit, self._post("/v1/fits", FitRequest, fields))

    def delete_allocation(self, identity: str) -> None:
        self._ask("DELETE", f"/v1/allocations/{_digest(identity)}")

    def delete_manifest(self, digest: str) -> None:
        self._ask("DELETE", f"/v1/manifests/{_digest(digest)}")

    def allocation(self, identity: str) -> Allocation:
        return self._parsed(Allocation, self._ask("GET", f"/v1/allocations/{_digest(identity)}"))

    def manifest(self, digest: str) -> Manifest:
        """A manifest by its own digest; the answer must have it."""
        where = f"{self.url}/v1/manifests/{_digest(digest)}"
        manifest = Manifest.parse(json.loads(self._ask("GET", f"/v1/manifests/{digest}")), where)
        if manifest.digest != digest:
            raise ContractError(f"{where}: is manifest {manifest.digest}")
        return manifest

    def manifest_of(self, allocation: Allocation) -> Manifest:
        """The manifest that came with an allocation (`allocate(manifest=True)`)."""
        where = f"{self.url}/v1/allocations"
        if allocation.manifest is None:
            raise InputError("the allocation came without its manifest; allocate(manifest=True) asks for it")
        manifest = Manifest.parse(parse_json(allocation.manifest, where), where)
        if manifest.digest != allocation.manifest_digest:
            raise ContractError(f"{where}: the manifest is {manifest.digest}, not {allocation.manifest_digest}")
        return manifest

    def sweep(self, **fields: Any) -> SweepResult:
        """Fields of `SweepRequest`."""
        return self._parsed(SweepResult, self._post("/v1/sweeps", SweepRequest, fields))

    def diff(self, before: str | dict[str, Any], after: str | dict[str, Any]) -> dict[str, Any]:
        """What changed between two manifests, each by digest, by the request that it answers (`{"allocation": {...}}`),
        or whole (`Manifest.payload()` and its digest)."""
        document: dict[str, Any] = json.loads(self._post("/v1/diff", DiffRequest, {"before": before, "after": after}))
        return document

    def make_checkpoint(self, manifest: str) -> Job:
        """Ask for the checkpoint of a stored manifest; needs a write token."""
        return self._parsed(Job, self._post("/v1/checkpoints", CheckpointRequest, {"manifest": manifest}))

    def job(self, identity: str) -> Job:
        return self._parsed(Job, self._ask("GET", f"/v1/jobs/{_digest(identity)}"))

    def jobs(self) -> Iterator[Job]:
        """All jobs of the store, by id."""
        return self._all("/v1/jobs", JobList)

    def cancel(self, identity: str) -> Job:
        """End a job that waits or is being made; needs a write token."""
        return self._parsed(Job, self._ask("POST", f"/v1/jobs/{_digest(identity)}/cancel"))

    def delete_job(self, identity: str) -> None:
        """Forget a job that has ended."""
        self._ask("DELETE", f"/v1/jobs/{_digest(identity)}")

    def wait(self, job: Job, tell: Callable[[Job], None] = lambda _job: None, seconds: float = 0.5) -> Job:
        """The job once it is done.

        Raises ServiceError with the reason if it failed or was cancelled, or if nothing was heard of it for an hour: no
        service may be left that can write to its disk.
        """
        heard = time.monotonic()
        while job.state in ("queued", "running"):
            tell(job)
            time.sleep(seconds)
            now = self.job(job.id)
            if now != job:
                heard = time.monotonic()
            elif time.monotonic() - heard > _SILENCE_SECONDS:
                reason = f"job {job.id} is {job.state} and has not changed for {_SILENCE_SECONDS // 60} minutes"
                raise ServiceError(504, "job_silent", f"{reason}; see the logs of the services of its disk", None)
            job = now
        if job.state == "failed":
            raise ServiceError(500, "job_failed", job.error or "the job failed", None)
        if job.state == "cancelled":
            raise ServiceError(409, "job_cancelled", f"job {job.id} was cancelled", None)
        return job

    def _all(self, path: str, kind: type[AnyPage]) -> Iterator[Any]:
        after = ""
        while True:
            page = self._parsed(kind, self._ask("GET", path + after))
            yield from page.data
            if page.next is None:
                return
            after = f"?after={page.next}"

    def _post(self, path: str, kind: type[BaseModel], fields: dict[str, Any]) -> bytes:
        try:
            body = kind(**fields)
        except ValidationError as error:
            item = error.errors(include_url=False)[0]
            place = ".".join(map(str, item["loc"]))
            raise InputError(f"{place}: {item['msg']}" if place else item["msg"]) from None
        return self._ask("POST", path, body.model_dump_json(exclude_none=True).encode())

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        for attempt in range(_MOST_WAITS + 1):
            status, headers, content = self._once(method, path, body)
            if status < 400:
                return content
            if status != 429 or attempt == _MOST_WAITS:
                raise _error_of(status, content)
            time.sleep(min(float(headers.get("retry-after", "1")), 30.0))
        raise AssertionError("unreachable")

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, dict[str, str], bytes]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            connection.request(method, self._prefix + path, body, headers)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise InputError(f"{self.url} does not answer ({error}); is `gamma sidecar` running there?") from None
        finally:
            connection.close()

    def _parsed(self, kind: type[AnyAnswer], content: bytes) -> AnyAnswer:
        try:
            return kind.model_validate_json(content)
        except ValidationError as error:
            raise ContractError(f"{self.url}: the answer is not of this release ({error.errors()[0]['msg']})") from None


def _digest(text: str) -> str:
    from allocator.sidecar.store import hex_of

    try:
        hex_of(text)
    except ValueError as error:
        raise InputError(str(error)) from None
    return text


def _error_of(status: int, content: bytes) -> ServiceError:
    try:
        error = json.loads(content)["error"]
        return ServiceError(status, str(error["type"]), str(error["message"]), error.get("param"))
    except (ValueError, KeyError, TypeError):
        return ServiceError(status, "unknown", f"the service answered {status}", None)
