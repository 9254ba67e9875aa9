"""Keeps what native libraries print off stdout, which belongs to the table or the JSON of a command."""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["stdout_to_stderr"]

_LOCK = threading.Lock()


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send file descriptor 1 to 2 meanwhile: HiGHS prints debugging lines even when told to be quiet."""
    with _LOCK:
        _flush_c_streams()
        try:
            saved = os.dup(1)
        except OSError:  # stdout is closed: nothing to keep clean
            yield
            return
        try:
            os.dup2(2, 1)
            yield
        finally:
            _flush_c_streams()
            os.dup2(saved, 1)
            os.close(saved)


def _flush_c_streams() -> None:
    ctypes.CDLL(None).fflush(None)
