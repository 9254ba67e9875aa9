"""Places for shares, for the tests: the registry of Docker's distribution, a proxy before it, and a small hub."""

import base64
import contextlib
import hashlib
import json
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
import yaml

from tests.programs import program
from tests.waiting import wait_for

LOGIN = ("ops", "correct horse battery")
_HTPASSWD = "ops:$2b$04$ugGP4pokX0wQf0Uh04YlQuykEqdwcJD8HLT7PECItLQqmkrumqWXq\n"  # LOGIN, by bcrypt


@contextlib.contextmanager
def registry(folder: Path, login: bool = False) -> Iterator[str]:
    """`docker-registry`, which keeps its blobs in `folder`; gives host:port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "version": 0.1,
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder)}},
        "http": {"addr": host},
    }
    if login:
        (folder / "htpasswd").write_text(_HTPASSWD)
        config["auth"] = {"htpasswd": {"realm": "tests", "path": str(folder / "htpasswd")}}
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    command = [program("docker-registry"), "serve", str(folder / "config.yml")]
    log = folder / "log"
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:

            def answers() -> bool:
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(httpx.TransportError):
                    return httpx.get(f"http://{host}/v2/").status_code in (200, 401)
                return False

            wait_for(answers, log.read_text)
            yield host
        finally:
            process.kill()


@dataclass
class Proxy:
    """Before a registry. `allowed_bytes` of blobs are answered, then connections break; `asks`: a token, by a login."""

    upstream: str
    host: str = ""
    allowed_bytes: int | None = None
    asks: bool = False
    answered_bytes: int = 0
    ranges: list[str] = field(default_factory=list)


@contextlib.contextmanager
def proxy(upstream: str) -> Iterator[Proxy]:
    state = Proxy(upstream)

    class Handler(_Handler):
        def answer(self, body: bytes) -> None:
            if self.path.startswith("/token"):
                right = "Basic " + base64.b64encode(":".join(LOGIN).encode()).decode()
                ok = self.headers["Authorization"] == right
                return self.send(200 if ok else 401, json.dumps({"token": "t0"} if ok else {}).encode())
            if state.asks and self.headers["Authorization"] != "Bearer t0":
                challenge = f'Bearer realm="http://{state.host}/token",service="tests"'
                return self.send(401, b"{}", {"WWW-Authenticate": challenge})
            passed = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "authorization")}
            url = f"http://{state.upstream}{self.path}"
            there = client.request(self.command, url, headers=passed | {"Host": state.host}, content=body)
            headers = {k: v for k, v in there.headers.items() if k.lower() not in ("content-length", "connection")}
            length = int(there.headers.get("Content-Length", len(there.content)))
            content = there.content
            if self.command == "GET" and "/blobs/" in self.path:
                state.ranges += [self.headers["Range"]] if "Range" in self.headers else []
                if state.allowed_bytes is not None:
                    content = content[: max(state.allowed_bytes - state.answered_bytes, 0)]
                state.answered_bytes += len(content)
            self.send(there.status_code, content, headers, length)

    with httpx.Client() as client, _serving(Handler) as state.host:
        yield state


@dataclass
class Hub:
    """`files`: of each commit, by path, the SHA-256 of the content in `blobs`. Everything asks for `token`."""

    url: str = ""
    token: str = "hf_test"
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    visibility: str = ""
    uploads: int = 0
    cut: int | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """The calls of huggingface.co that pushing to and pulling from one repository, org/scores, take."""
    state = Hub()

    class Handler(_Handler):
        def answer(self, body: bytes) -> None:
            path = unquote(urlsplit(self.path).path)
            if self.headers["Authorization"] != f"Bearer {state.token}" and not path.startswith("/lfs/"):
                return self.fail(401, "RepoNotFound")
            if path == "/api/repos/create":
                state.visibility, state.branches = json.loads(body)["visibility"], {"main": "0" * 40}
                state.files["0" * 40] = {}
                return self.json({"url": f"{state.url}/org/scores"})
            if path == "/api/validate-yaml":
                return self.json({"errors": [], "warnings": []})
            if path.startswith("/lfs/"):
                state.blobs[path.removeprefix("/lfs/")] = body
                state.uploads += 1
                return self.send(200, b"")
            if not state.branches:
                return self.fail(404, "RepoNotFound")
            for prefix, act in self.calls().items():
                if path.startswith(prefix):
                    return act(path.removeprefix(prefix).strip("/"), body)
            self.fail(404, "RepoNotFound")

        def calls(self) -> dict[str, Callable[[str, bytes], None]]:
            at = "/api/models/org/scores"
            return {
                f"{at}/preupload": self.modes,
                f"{at}/commit": self.commit,
                f"{at}/branch": self.branch,
                "/org/scores.git/info/lfs/objects/batch": self.batch,
                "/org/scores/resolve": self.resolve,
                f"{at}/revision": self.info,
                at: self.info,
            }

        def fail(self, code: int, kind: str) -> None:
            self.send(code, b"{}", {"X-Error-Code": kind, "X-Error-Message": kind})

        def json(self, content: Any) -> None:
            self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def commit_of(self, revision: str) -> str | None:
            return state.branches.get(revision) or (revision if revision in state.files else None)

        def info(self, revision: str, _body: bytes) -> None:
            commit = self.commit_of(revision or "main")
            if commit is None:
                return self.fail(404, "RevisionNotFound")
            self.json({"id": "org/scores", "sha": commit, "siblings": [{"rfilename": p} for p in state.files[commit]]})

        def branch(self, name: str, _body: bytes) -> None:
            state.branches.setdefault(name, state.branches["main"])
            self.json({})

        def modes(self, _revision: str, body: bytes) -> None:
            def mode(file: dict[str, Any]) -> dict[str, Any]:
                large = file["path"].endswith(".safetensors")
                return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

            self.json({"files": [mode(file) for file in json.loads(body)["files"]]})

        def batch(self, _rest: str, body: bytes) -> None:
            objects = json.loads(body)["objects"]
            for item in objects:
                if item["oid"] not in state.blobs:
                    item["actions"] = {"upload": {"href": f"{state.url}/lfs/{item['oid']}"}}
            self.json({"transfer": "basic", "objects": objects})

        def commit(self, branch: str, body: bytes) -> None:
            files = dict(state.files[state.branches[branch]])
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "lfsFile":
                    files[value["path"]] = value["oid"]
                elif item["key"] == "file":
                    content = base64.b64decode(value["content"])
                    files[value["path"]] = hashlib.sha256(content).hexdigest()
                    state.blobs[files[value["path"]]] = content
                elif item["key"] == "deletedFile":
                    del files[value["path"]]
            commit = hashlib.sha1(json.dumps(files, sort_keys=True).encode()).hexdigest()
            state.files[commit], state.branches[branch] = files, commit
            self.json({"commitUrl": f"{state.url}/org/scores/commit/{commit}", "commitOid": commit})

        def resolve(self, rest: str, _body: bytes) -> None:
            revision, _, path = rest.partition("/")
            commit = self.commit_of(revision)
            if commit is None:
                return self.fail(404, "RevisionNotFound")
            if path not in state.files[commit]:
                return self.fail(404, "EntryNotFound")
            digest = state.files[commit][path]
            content, code = state.blobs[digest], 200
            headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
            if "Range" in self.headers and self.command == "GET":
                begin = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
                headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
                content, code = content[begin:], 206
            length = len(content)
            if self.command == "GET" and state.cut is not None and length > state.cut:
                content, state.cut = content[: state.cut], None
            self.send(code, content, headers, length)

    with _serving(Handler) as host:
        state.url = f"http://{host}"
        yield state


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: bytes) -> None:
        raise NotImplementedError

    def handle_request(self) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.answer(self.body())

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, code: int, content: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        """`content`, said to be `length` bytes; if there are fewer, the connection breaks then."""
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
            if length is not None and len(content) < length:
                self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = handle_request  # noqa: N815


@contextlib.contextmanager
def _serving(handler: type[_Handler]) -> Iterator[str]:
    ThreadingHTTPServer.daemon_threads = True
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
