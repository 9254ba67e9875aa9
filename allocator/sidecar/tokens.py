"""Bearer tokens from files: `read TOKEN` or `write TOKEN` a line. A changed file is read again."""

import hashlib
import hmac
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from allocator.contract.errors import InputError

__all__ = ["Scope", "Tokens"]

Scope = Literal["read", "write"]
Stamp = tuple[int, int, int, int]

_MAX_BYTES = 1 << 20
_LEAST_LENGTH = 16
_LOOK_SECONDS = 1.0


class Tokens:
    """Which token may do what. Only hashes are kept; comparison takes the same time for every token.

    Lines that begin with # are comments. Each file stands for itself: one that is emptied, deleted or broken later
    gives no token any more, and `problems` says why, by path. Raises InputError when one cannot be used from the start.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(dict.fromkeys(paths))
        self._seen: dict[Path, Stamp | None] = {}
        self._hashes: dict[Path, list[tuple[Scope, bytes]]] = {}
        self._looked = 0.0
        self.problems: dict[Path, str] = {}
        self.look()
        if self.problems:
            raise InputError("; ".join(self.problems.values()))

    def scope_of(self, token: str) -> Scope | None:
        """What `token` may do, None if it is not known."""
        if time.monotonic() - self._looked >= _LOOK_SECONDS:
            self.look()
        given = _hash(token)
        found: Scope | None = None
        for scope, known in [entry for entries in self._hashes.values() for entry in entries]:
            if hmac.compare_digest(given, known) and found != "write":
                found = scope
        return found

    def look(self) -> None:
        """Read the files that changed."""
        self._looked = time.monotonic()
        for path in self._paths:
            stamp = _stamp(path)
            if path in self._seen and stamp is not None and stamp == self._seen[path]:
                continue
            self._seen[path] = stamp
            try:
                self._hashes[path] = _read(path)
                self.problems.pop(path, None)
            except InputError as error:
                self._hashes[path] = []
                self.problems[path] = str(error)


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _read(path: Path) -> list[tuple[Scope, bytes]]:
    try:
        content = path.read_bytes()[: _MAX_BYTES + 1]
        lines = content.decode("ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"token file {path}: cannot be read ({error})") from None
    if len(content) > _MAX_BYTES:
        raise InputError(f"token file {path}: larger than {_MAX_BYTES} bytes")
    entries: list[tuple[Scope, bytes]] = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or words[0] not in ("read", "write") or len(words[1]) < _LEAST_LENGTH:
            raise InputError(
                f"token file {path}, line {number}: expected `read TOKEN` or `write TOKEN` "
                f"with a token of at least {_LEAST_LENGTH} characters"
            )
        scope: Scope = "write" if words[0] == "write" else "read"
        entries.append((scope, _hash(words[1])))
    if not entries:
        raise InputError(f"token file {path}: holds no token")
    return entries
