"""Whether an output can be written, found out before the work: one check for all verbs, which leaves nothing behind."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from allocator.contract.errors import InputError

__all__ = ["check_output_file", "check_output_folder", "is_out_of_room", "naming_lack_of_room"]

_OUT_OF_ROOM = {errno.ENOSPC, errno.EDQUOT}


def check_output_file(path: Path, option: str = "--out") -> None:
    """Raises InputError, naming `option`, when a file cannot be written at `path`, whose parents need not exist."""
    if path.is_dir():
        raise InputError(f"{option} {path}: it is a folder; give the name of a file")
    if path.exists() and not path.is_file():
        raise InputError(f"{option} {path}: it is no regular file and would be replaced; give another name")
    _check_parents(path.absolute().parent, f"{option} {path}")


def check_output_folder(path: Path, option: str = "--out", *, replaced: bool = False) -> None:
    """Raises InputError, naming `option`, when files cannot be written into the folder `path`, which need not exist.

    `replaced`: the folder appears as a whole, in the place of what is there.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{option} {path}: it is a file; give a folder")
    if replaced and os.path.ismount(path):
        raise InputError(f"{option} {path}: a disk is mounted there, which cannot be replaced; give a folder inside it")
    _check_parents(path.resolve().parent if replaced else path.absolute(), f"{option} {path}")


def _check_parents(folder: Path, what: str) -> None:
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        kind = "a link that leads nowhere" if folder.is_symlink() else "a file"
        raise InputError(f"{what}: {folder} is {kind}, no folder; give another place")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{what}: nothing can be written in {folder} ({error.strerror}); give another place, or change its rights"
        ) from None


def is_out_of_room(error: BaseException) -> bool:
    """Whether `error` says that a disk or a quota is full; libraries in Rust say it in their text only."""
    if isinstance(error, OSError) and error.errno in _OUT_OF_ROOM:
        return True
    return any(f"(os error {number})" in str(error) for number in _OUT_OF_ROOM)


@contextmanager
def naming_lack_of_room(folder: Path, kept: str) -> Iterator[None]:
    """What runs out of room on the disk of `folder` raises InputError; `kept` says what is kept for the next run."""
    try:
        yield
    except Exception as error:
        if not is_out_of_room(error):
            raise
        raise InputError(f"{folder}: its disk is full; make room and give the same command again. {kept}") from error
