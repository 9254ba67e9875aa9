"""How the service calls its solver processes: by name, so that only they load the solvers."""

from typing import Any, Literal

__all__ = ["Task", "begin", "call"]

Task = Literal["warm", "allocate", "sweep", "diff", "plan"]


def begin(store_url: str) -> None:
    """Run in each new process."""
    from allocator.sidecar import tasks

    tasks.begin(store_url)


def call(task: Task, *arguments: Any) -> Any:
    """Run one function of `tasks` in this process."""
    from allocator.sidecar import tasks

    return getattr(tasks, task)(*arguments)
