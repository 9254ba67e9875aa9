"""Who may ask what, and what strangers can send."""

import contextlib
import itertools
import json
import os
import select
import socket
from pathlib import Path

import httpx
import pytest

from allocator.contract.errors import InputError
from allocator.sidecar.settings import is_loopback
from allocator.sidecar.tokens import Tokens
from tests.skips import lacking
from tests.waiting import wait_for

from .serving import Running, running

READ, WRITE = "reader-token-0123456789", "writer-token-0123456789"


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_scopes_and_reloading(store: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"# two of them\nread {READ}\nwrite {WRITE}\n")
    with running(tmp_path / "log", "--store", store, "--token-file", tokens) as service:
        for headers in ({}, _bearer("wrong-token-0123456789"), {"Authorization": f"Basic {READ}"}):
            answer = service.http.get("/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        for path in ("/healthz", "/readyz", "/metrics", "/version", "/", "/openapi.json"):
            assert service.http.get(path).status_code == 200
        body = {"model": "tiny", "budget": "177_000"}
        count = len(list((store / "allocations").glob("*"))) if (store / "allocations").exists() else 0
        made = service.post("/v1/allocations", body, headers=_bearer(READ))
        manifest = {"manifest": made["manifest_digest"]}
        assert service.http.post("/v1/checkpoints", json=manifest, headers=_bearer(READ)).status_code == 403
        assert service.http.post("/v1/checkpoints", json=manifest, headers=_bearer(WRITE)).status_code == 404
        assert service.post("/v1/allocations", body, headers=_bearer(WRITE)) == made  # now it is kept
        assert len(list((store / "allocations").glob("*"))) == count + 1
        assert service.http.post("/v1/checkpoints", json=manifest, headers=_bearer(WRITE)).status_code == 202

        tokens.write_text("read another-token-0123456789\n")
        wait_for(lambda: service.http.get("/v1/models", headers=_bearer(READ)).status_code == 401)
        assert service.http.get("/v1/models", headers=_bearer("another-token-0123456789")).status_code == 200

        tokens.write_text("")
        wait_for(lambda: "gamma_sidecar_unusable_token_files 1.0" in service.http.get("/metrics").text)
        answer = service.http.get("/v1/models", headers=_bearer("another-token-0123456789"))
        assert answer.status_code == 401
        assert "log has the reason" in answer.json()["error"]["message"]
        assert "holds no token" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    "content", ["", "read short\n", "admin 0123456789abcdef\n", "read one two three\n", "read \xff"]
)
def test_a_wrong_token_file_is_refused_at_the_start(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match="token file"):
        Tokens([path])


@pytest.mark.parametrize("content", [None, "", "nonsense\n", f"write {WRITE}\nread short\n"])
def test_a_token_file_that_goes_bad_gives_no_tokens_any_more(tmp_path: Path, content: str | None) -> None:
    """Emptied, deleted, broken: a token that was taken back must not live on. Other files keep theirs."""
    path, other = tmp_path / "tokens", tmp_path / "other"
    path.write_text(f"write {WRITE}\n")
    other.write_text(f"read {READ}\n")
    tokens = Tokens([path, other])
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    tokens.look()
    assert tokens.scope_of(WRITE) is None
    assert tokens.scope_of(READ) == "read"
    assert str(path) in tokens.problems[path]
    path.write_text(f"write {WRITE}\n")
    tokens.look()
    assert tokens.scope_of(WRITE) == "write"
    assert not tokens.problems


def test_without_tokens_other_machines_get_probes_only(store: Path, tmp_path: Path) -> None:
    address = _own_address()
    with running(tmp_path / "log", "--store", store, "--host", "0.0.0.0") as service:
        port = service.url.rpartition(":")[2]
        url = f"http://{address}:{port}"
        assert httpx.get(url + "/healthz").status_code == 200
        assert httpx.get(url + "/metrics").status_code == 200
        assert httpx.get(url + "/v1/models").status_code == 401
        assert httpx.get(url + "/").status_code == 401
        assert service.get("/v1/models")["data"]


def test_another_name_for_this_machine_is_refused(sidecar: Running) -> None:
    """DNS rebinding: a page of evil.example makes a browser ask 127.0.0.1 under its own name."""
    assert sidecar.http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 421
    assert sidecar.http.get("/v1/models", headers={"Host": "localhost:1"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("::ffff:127.0.0.1", True), ("0.0.0.0", False),
     ("::", False), ("10.0.0.1", False), ("example.org", False)],
)  # fmt: skip
def test_what_is_this_machine(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_a_huge_body_is_refused_before_it_is_read(sidecar: Running) -> None:
    answer = sidecar.http.post("/v1/allocations", content=b"{" + b" " * (2 << 20) + b"}")
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "too_large"

    def endless():
        for _ in range(64):
            yield b" " * (1 << 16)

    with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError):
        assert sidecar.http.post("/v1/allocations", content=endless()).status_code == 413
    assert sidecar.get("/healthz")["status"] == "ok"


def test_a_slow_body_is_given_up(store: Path, tmp_path: Path) -> None:
    with running(tmp_path / "log", "--store", store, "--body-seconds", 0.5) as service:
        host, port = service.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            head = f"POST /v1/allocations HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            connection.sendall((head + "Content-Length: 100\r\n\r\n{").encode())
            assert b" 408 " in connection.recv(4096)
        assert service.get("/healthz")["status"] == "ok"


@pytest.mark.parametrize("http", ["auto", "h11"])
def test_slow_headers_are_given_up(store: Path, tmp_path: Path, http: str) -> None:
    """Also on a connection that had a request, and on one that says nothing; a byte now and then does not help."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['httptools'] = None\n" if http == "h11" else "")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), os.getcwd()])
    flags = ["--store", store, "--header-seconds", 0.7]
    with running(tmp_path / "log", *flags, PYTHONPATH=path) as service:
        host, port = service.url.removeprefix("http://").split(":")
        whole = f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        with (
            socket.create_connection((host, int(port)), timeout=30) as fresh,
            socket.create_connection((host, int(port)), timeout=30) as used,
            socket.create_connection((host, int(port)), timeout=30) as silent,
            socket.create_connection((host, int(port)), timeout=30) as partial,
        ):
            partial.sendall(whole[:20])
            used.sendall(whole)
            first = used.recv(4096)
            while b"}" not in first:  # the body may come after the head
                first += used.recv(4096)
            assert b" 200 " in first
            with contextlib.suppress(ConnectionError):
                endless = itertools.chain(whole[:-2], b"X-Long: ", itertools.repeat(b"a"[0]))
                for byte in endless:  # until they are given up
                    fresh.sendall(bytes([byte]))
                    used.sendall(bytes([byte]))
                    select.select([fresh, used], [], [], 0.05)
            for connection in (fresh, used):
                answer = b""
                with contextlib.suppress(ConnectionError):
                    answer = connection.recv(4096)
                assert answer == b"" or b" 408 " in answer
            assert silent.recv(1) == b""
            assert partial.recv(4096).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection((host, int(port)), timeout=30) as large:
            with contextlib.suppress(ConnectionError):
                large.sendall(b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: %s\r\n" % (i, b"a" * 4000) for i in range(2000)))
            answer = b""
            with contextlib.suppress(ConnectionError):
                answer = large.recv(4096)
            assert answer == b"" or b" 431 " in answer or b" 400 " in answer
        assert service.get("/healthz")["status"] == "ok"


@pytest.mark.parametrize(
    "content",
    [b"\x00\xff\xfe\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /%zz HTTP/1.1\r\nHost: localhost\r\n\r\n",
     b"POST /v1/allocations HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
     b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"],
)  # fmt: skip
def test_broken_http_harms_nobody(sidecar: Running, content: bytes) -> None:
    host, port = sidecar.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(4096):
                answer += part
    assert not answer.startswith(b"HTTP/1.1 5")
    assert not answer or json.loads(answer.partition(b"\r\n\r\n")[2])["error"].keys() == {"type", "message", "param"}
    assert sidecar.get("/healthz")["status"] == "ok"


def test_no_secret_is_in_the_log(store: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"write {WRITE}\n")
    with running(tmp_path / "log", "--store", store, "--token-file", tokens, "--log-level", "debug") as service:
        service.get("/v1/models", headers=_bearer(WRITE))
        assert WRITE not in (tmp_path / "log").read_text()
    assert os.environ.get("GAMMA_TOKEN") is None


def _own_address() -> str:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip(lacking("system", "this machine has no address beside loopback"))
        address = str(probe.getsockname()[0])
    if address.startswith("127."):
        pytest.skip(lacking("system", "this machine has no address beside loopback"))
    return address
