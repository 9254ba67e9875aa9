"""A folder of a node that outlives its pods: checkpoints and compiled graphs, up to a size.

An entry is a folder in it that holds a file `.in-use`. Whoever uses an entry has a shared lock on that file, which the
kernel gives back when the process ends, however it ends; the file's time is when it was taken last. Folders without
that file are nobody's business here. Pods of a node share its kernel, so locks hold between them.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from allocator.contract.amounts import format_bytes
from allocator.contract.errors import InputError

__all__ = ["IN_USE_NAME", "CacheEntry", "cache_entries", "hold", "make_room", "take_slot", "using"]

IN_USE_NAME = ".in-use"

# Between an init container that prepared an entry and the container that serves it nobody has a lock on it.
_STARTING_SECONDS = 3600.0
_REMOVING = ".removing-"


@dataclass(frozen=True)
class CacheEntry:
    """`used_at` is in seconds since 1970. In use: somebody has it, or took it within the last hour."""

    path: Path
    nbytes: int
    used_at: float
    in_use: bool


def hold(entry: Path, shared: bool = True, wait: bool = True) -> int:
    """Make `entry` if it is not there, and lock it; the descriptor of the lock, which ends with it.

    Raises BlockingIOError without `wait` when another has a lock that does not go together with this one.
    """
    mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        with contextlib.suppress(OSError):  # a read-only mount of an entry that is there
            entry.mkdir(parents=True, exist_ok=True)
        path = entry / IN_USE_NAME
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # removed between the two
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, mode)
        except BlockingIOError:
            os.close(descriptor)
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                with contextlib.suppress(OSError):
                    os.utime(path)
                return descriptor
        os.close(descriptor)  # it was removed before the lock came


@contextmanager
def using(entry: Path) -> Iterator[None]:
    """Nobody removes `entry` meanwhile."""
    descriptor = hold(entry)
    try:
        yield
    finally:
        os.close(descriptor)


def take_slot(root: Path, name: str) -> tuple[Path, int]:
    """The first of `name.0`, `name.1`, ... in `root` that no other process has, and the descriptor of its lock.

    For what one process writes and reads, such as compiled graphs: replicas on a node do not write into each other's.
    """
    number = 0
    while True:
        slot = root / f"{name}.{number}"
        try:
            return slot, hold(slot, shared=False, wait=False)
        except BlockingIOError:
            number += 1


def cache_entries(root: Path) -> list[CacheEntry]:
    """The entries of `root`, the one that was not used for longest first."""
    found = []
    for marker in root.glob(f"*/{IN_USE_NAME}"):
        if marker.parent.name.startswith(_REMOVING):
            continue
        with contextlib.suppress(FileNotFoundError):
            busy = _busy(marker)
            used_at = marker.stat().st_mtime
            recent = time.time() - used_at < _STARTING_SECONDS
            found.append(CacheEntry(marker.parent, _size(marker.parent), used_at, busy or recent))
    return sorted(found, key=lambda entry: (entry.used_at, entry.path))


def make_room(root: Path, limit_bytes: int, wanted_bytes: int = 0, keep: Path | None = None) -> list[CacheEntry]:
    """Remove entries of `root`, never one in use and never `keep`, until `wanted_bytes` more stay within `limit_bytes`.

    The oldest go first; those that were removed are returned. Raises InputError when what is left is too much.
    """
    for folder in root.glob(f"{_REMOVING}*"):  # of a pod that was killed meanwhile
        shutil.rmtree(folder, ignore_errors=True)
    entries = cache_entries(root)
    total = sum(entry.nbytes for entry in entries)
    removed = []
    for entry in entries:
        if total + wanted_bytes <= limit_bytes:
            break
        if not entry.in_use and entry.path != keep and _remove(entry.path):
            total -= entry.nbytes
            removed.append(entry)
    if total + wanted_bytes > limit_bytes:
        raise InputError(
            f"{root}: {format_bytes(wanted_bytes)} more do not fit: {format_bytes(total)} are in use or were used "
            f"within the last hour, the limit is {format_bytes(limit_bytes)}; give the cache more, or the node "
            "fewer models"
        )
    return removed


def _busy(marker: Path) -> bool:
    """Whether somebody has a lock. What is in use is used now, so that it does not look old once it is let go."""
    descriptor = os.open(marker, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.utime(marker)
        return True
    finally:
        os.close(descriptor)
    return False


def _remove(entry: Path) -> bool:
    """False if somebody took it meanwhile. It is gone at once: a kill leaves nothing that looks like an entry."""
    try:
        descriptor = os.open(entry / IN_USE_NAME, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        aside = entry.with_name(f"{_REMOVING}{entry.name}")
        os.rename(entry, aside)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    shutil.rmtree(aside, ignore_errors=True)
    return True


def _size(folder: Path) -> int:
    total = 0
    for path, _folders, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
    return total
