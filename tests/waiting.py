"""The one place where tests wait: for a condition, never for a time."""

import time
from collections.abc import Callable
from typing import Any

__all__ = ["wait_for"]


def wait_for(condition: Callable[[], Any], what: Callable[[], object] | str = "", seconds: float = 60) -> Any:
    """The first value of `condition` that counts as true, asked again and again.

    Raises AssertionError after `seconds`, which are many, for machines that are slow; `what` says what is wrong then.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, what() if callable(what) else what
        time.sleep(0.02)
    return value
