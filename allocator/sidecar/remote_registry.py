"""Shares in an OCI registry: one artifact, whose config is `gamma_share.json` and whose layers are the files.

The calls are those of the OCI distribution specification 1.1. Layers carry their path as
`org.opencontainers.image.title`, so that `oras pull` brings the same files.
"""

import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import httpx

from allocator.contract.digest import digest_bytes
from allocator.contract.errors import ContractError, InputError
from allocator.sidecar.registry_login import find_login
from allocator.sidecar.sharing import LocalFile, Share, SharedFile, reaching
from allocator.sidecar.store import document_text

__all__ = ["RegistryRemote"]

_ARTIFACT = "application/vnd.gamma.share.v1"
_CONFIG = "application/vnd.gamma.share.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_LAYER = "application/octet-stream"
_TITLE = "org.opencontainers.image.title"
_MANIFEST_BYTES = 4 << 20
"""What registries take at most."""
_TRIES = 4
"""Without a byte in between."""


class RegistryRemote:
    """A tag of a repository, or with `digest` exactly that artifact. Plain HTTP is spoken with this machine alone."""

    def __init__(self, address: str, host: str, repository: str, tag: str | None, digest: str | None) -> None:
        if host == "docker.io":
            host = "registry-1.docker.io"
        self.address, self._tag, self._digest = address, tag, digest
        self._host, self._repository = host, repository
        name = urlsplit(f"//{host}").hostname or ""
        scheme = "http" if name in ("localhost", "::1") or name.startswith("127.") else "https"
        self._root = f"{scheme}://{host}"
        self._base = f"{self._root}/v2/{repository}"
        plain = {"Accept-Encoding": "identity"}  # bytes as they are stored, for ranges
        self._http = httpx.Client(timeout=httpx.Timeout(60, connect=10), follow_redirects=True, headers=plain)
        self._authorization: str | None = None

    def read(self) -> bytes:
        with reaching(self.address):
            answer = self._ask(
                "GET", f"{self._base}/manifests/{self._digest or self._tag}", headers={"Accept": _MANIFEST}
            )
            if answer.status_code == 404:
                raise InputError(f"{self.address}: there is no such artifact; is the name right, and the tag?")
            self._expect(answer, 200)
            content = answer.content
            if self._digest is not None and digest_bytes(content) != self._digest:
                raise ContractError(f"{self.address}: the registry answered with {digest_bytes(content)}")
            try:
                config = json.loads(content)["config"]
                kind, digest = config["mediaType"], str(config["digest"])
            except (ValueError, KeyError, TypeError):
                raise ContractError(f"{self.address}: the registry's answer is no manifest of an artifact") from None
            if kind != _CONFIG:
                raise InputError(f"{self.address}: is something else ({kind}); scores are pushed by `gamma store push`")
            answer = self._ask("GET", f"{self._base}/blobs/{digest}")
            self._expect(answer, 200)
            if digest_bytes(answer.content) != digest:
                raise ContractError(f"{self.address}: the config is not {digest}; it is damaged")
            return answer.content

    def fetch(self, file: SharedFile, target: Path, tell: Callable[[int], None]) -> None:
        with reaching(self.address), target.open("ab") as output:
            tell(output.tell())
            failures = 0
            while True:
                before = output.tell()
                try:
                    self._append(file, output, tell)
                    return
                except httpx.TransportError:
                    failures = 0 if output.tell() > before else failures + 1
                    if failures == _TRIES:
                        raise
                    time.sleep(0.1 * 2**failures)

    def push(self, share: Share, local: LocalFile, tell: Callable[[int], None]) -> str:
        if self._tag is None:
            raise InputError(f"{self.address}: a digest is the registry's to give; push to a tag")
        config = document_text(share).encode()
        layers = [
            {"mediaType": _LAYER, "digest": f.digest, "size": f.nbytes, "annotations": {_TITLE: f.path}}
            for f in share.files
        ]
        manifest = json.dumps({
            "schemaVersion": 2, "mediaType": _MANIFEST, "artifactType": _ARTIFACT,
            "config": {"mediaType": _CONFIG, "digest": digest_bytes(config), "size": len(config)},
            "layers": layers,
        }).encode()  # fmt: skip
        if len(manifest) > _MANIFEST_BYTES:
            raise InputError(
                f"{self.address}: {len(layers)} files make a manifest of {len(manifest)} bytes, registries take "
                f"{_MANIFEST_BYTES}; push --scores-only, or to the hub"
            )
        with reaching(self.address):
            for file in share.files:
                if not self._has(file.digest):
                    with local(file) as path:
                        self._upload(file.digest, partial(path.open, "rb"))
                tell(file.nbytes)
            if not self._has(digest_bytes(config)):
                self._upload(digest_bytes(config), lambda: config)
            url = f"{self._base}/manifests/{self._tag}"
            self._expect(self._ask("PUT", url, headers={"Content-Type": _MANIFEST}, content=lambda: manifest), 201)
        return f"oci://{self._host}/{self._repository}@{digest_bytes(manifest)}"

    def _append(self, file: SharedFile, output: IO[bytes], tell: Callable[[int], None]) -> None:
        """Get what `output` lacks of the blob."""
        have = output.tell()
        if have >= file.nbytes > 0:
            return  # the caller compares the digest
        headers = {"Range": f"bytes={have}-"} if have else {}
        with self._streaming(f"{self._base}/blobs/{file.digest}", headers) as answer:
            if answer.status_code == 404:
                raise ContractError(f"{self.address}: the registry has lost {file.path} ({file.digest}); push it again")
            if answer.status_code != 206:
                self._expect(answer, 200)
                output.truncate(0)  # this registry begins anew
                output.seek(0)
            for chunk in answer.iter_raw():
                output.write(chunk)
                tell(len(chunk))
                if output.tell() > file.nbytes:
                    return  # more than was said; the caller refuses it

    def _has(self, digest: str) -> bool:
        answer = self._ask("HEAD", f"{self._base}/blobs/{digest}")
        if answer.status_code == 404:
            return False
        self._expect(answer, 200)
        return True

    def _upload(self, digest: str, content: Callable[[], Any]) -> None:
        answer = self._ask("POST", f"{self._base}/blobs/uploads/")
        self._expect(answer, 202)
        place = str(httpx.URL(str(answer.request.url)).join(answer.headers["Location"]))
        place += f"{'&' if '?' in place else '?'}digest={digest}"
        headers = {"Content-Type": _LAYER}
        self._expect(self._ask("PUT", place, headers=headers, content=content), 201)

    def _ask(
        self, method: str, url: str, headers: dict[str, str] | None = None, content: Callable[[], Any] | None = None
    ) -> httpx.Response:
        """One request, and once more with a login when the registry asks for it. `content` is opened for each."""
        answer = self._once(method, url, headers, content)
        if answer.status_code == 401 and self._log_in(answer, url):
            answer = self._once(method, url, headers, content)
        return answer

    def _once(
        self, method: str, url: str, headers: dict[str, str] | None, content: Callable[[], Any] | None
    ) -> httpx.Response:
        body = None if content is None else content()
        try:
            return self._http.request(method, url, headers=self._headers(url, headers), content=body)
        finally:
            if isinstance(body, io.IOBase):
                body.close()

    @contextmanager
    def _streaming(self, url: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        for again in (True, False):
            with self._http.stream("GET", url, headers=self._headers(url, headers)) as answer:
                if answer.status_code == 401 and again and self._log_in(answer, url):
                    continue
                yield answer
                return

    def _headers(self, url: str, headers: dict[str, str] | None) -> dict[str, str]:
        """The login is for the registry's own address, not for a storage that it sends us to."""
        ours = self._authorization is not None and url.startswith(f"{self._root}/")
        return (headers or {}) | ({"Authorization": str(self._authorization)} if ours else {})

    def _log_in(self, answer: httpx.Response, url: str) -> bool:
        if not url.startswith(f"{self._root}/"):
            return False
        challenge = answer.headers.get("WWW-Authenticate", "")
        reads = answer.request.method in ("GET", "HEAD")
        scope = f"repository:{self._repository}:{'pull' if reads else 'pull,push'}"
        self._authorization = find_login(self._host).header(challenge, scope, self._http)
        return self._authorization is not None

    def _expect(self, answer: httpx.Response, status: int) -> None:
        if answer.status_code == status:
            return
        reason = f"{answer.status_code} {answer.reason_phrase}"
        try:
            errors = json.loads(answer.read())["errors"]
            reason += "".join(f", {error.get('code')}: {error.get('message')}" for error in errors[:2])
        except (ValueError, KeyError, TypeError, AttributeError, httpx.HTTPError):
            pass
        if answer.status_code in (401, 403):
            raise InputError(
                f"{self.address}: the registry refuses ({reason}); log in with `docker login {self._host}` (or podman, "
                "helm, oras), or name the file of the login in REGISTRY_AUTH_FILE"
            )
        method = answer.request.method
        raise InputError(f"{self.address}: the registry answers {method} with {reason}")
