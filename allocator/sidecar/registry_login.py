"""Who we are at an OCI registry: from the files that docker, podman and helm log in to, and the token it hands out."""

import base64
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx

from allocator.contract.errors import InputError

__all__ = ["Login", "find_login"]

_PARAMETER = re.compile(r'(\w+)="([^"]*)"')
_HELPER_SECONDS = 30
_BY_TOKEN = "<token>"
"""The name that a credential helper gives for an identity token."""


class Login:
    """Name and password, or an identity token; empty for nobody. `header` answers a registry's challenge."""

    def __init__(self, name: str = "", secret: str = "") -> None:
        self._name, self._secret = name, secret

    def header(self, challenge: str, scope: str, http: httpx.Client) -> str | None:
        """The Authorization header for a `WWW-Authenticate` of Basic or Bearer, None where there is none to give.

        Raises httpx.HTTPError when the service that hands out tokens does not answer.
        """
        kind, _, rest = challenge.partition(" ")
        basic = base64.b64encode(f"{self._name}:{self._secret}".encode()).decode()
        known = bool(self._secret) and self._name != _BY_TOKEN
        if kind.lower() == "basic":
            return f"Basic {basic}" if known else None
        if kind.lower() != "bearer":
            return None
        asked = dict(_PARAMETER.findall(rest))
        realm, about = asked.pop("realm", ""), {"scope": scope} | asked
        if self._name == _BY_TOKEN:
            form = about | {"grant_type": "refresh_token", "refresh_token": self._secret, "client_id": "gamma"}
            answer = http.post(realm, data=form)
        else:
            answer = http.get(realm, params=about, headers={"Authorization": f"Basic {basic}"} if known else {})
        if answer.status_code != 200:
            return None
        given = answer.json()
        return f"Bearer {given.get('token') or given.get('access_token')}"


def find_login(host: str) -> Login:
    """The login for `host`: of REGISTRY_AUTH_FILE, of podman, of DOCKER_CONFIG, of docker, whichever has one first.

    Raises InputError for a file that cannot be read, and for a credential helper that fails.
    """
    for path in _files():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            login = _login_of(content, host)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise InputError(f"{path}: cannot be read ({error}); log in again, or remove it") from None
        if login is not None:
            return login
    return Login()


def _files() -> list[Path]:
    named = os.environ.get("REGISTRY_AUTH_FILE")
    runtime, docker = os.environ.get("XDG_RUNTIME_DIR"), os.environ.get("DOCKER_CONFIG")
    files = [Path(named)] if named else []
    files += [Path(runtime) / "containers" / "auth.json"] if runtime else []
    return [*files, (Path(docker) if docker else Path.home() / ".docker") / "config.json"]


def _login_of(content: dict[str, Any], host: str) -> Login | None:
    hosts = [host, f"https://{host}"]
    if host == "registry-1.docker.io":
        hosts += ["docker.io", "https://index.docker.io/v1/"]
    entries, helpers = content.get("auths") or {}, content.get("credHelpers") or {}
    for key in hosts:
        entry = entries.get(key) or {}
        if entry.get("identitytoken"):
            return Login(_BY_TOKEN, entry["identitytoken"])
        if entry.get("auth"):
            name, _, secret = base64.b64decode(entry["auth"]).decode().partition(":")
            return Login(name, secret)
        helper = helpers.get(key) or (content.get("credsStore") if key in entries else None)
        if helper:
            return _ask(helper, key)
    return None


def _ask(helper: str, key: str) -> Login | None:
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run(
            [program, "get"], input=key, capture_output=True, text=True, check=False, timeout=_HELPER_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"credential helper {program} for {key}: {error}") from None
    if done.returncode:
        if "credentials not found" in done.stdout.lower():
            return None
        raise InputError(f"credential helper {program} for {key}: {(done.stdout or done.stderr).strip()[:200]}")
    found = json.loads(done.stdout)
    return Login(found["Username"], found["Secret"])
