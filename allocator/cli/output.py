"""Tables and JSON on stdout, progress on stderr."""

import csv
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from allocator import progress

__all__ = ["leads", "print_csv", "print_json", "print_tables", "show_progress"]


def print_json(document: Any) -> None:
    json.dump(document, sys.stdout, indent=1)
    sys.stdout.write("\n")


def print_csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """A head and one line a row; an unknown value is empty."""
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def print_tables(*renderables: RenderableType) -> None:
    console = Console()
    for renderable in renderables:
        # Lines of text may hold paths to copy: they are never wrapped.
        console.print(renderable, soft_wrap=isinstance(renderable, str), highlight=False)


@contextmanager
def show_progress() -> Iterator[progress.Progress]:
    """A bar a step on stderr; one line a step where stderr is no terminal. Libraries' own bars are turned off."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    console = Console(stderr=True)
    if not leads():
        yield progress.silent
        return
    with _messages_on(console):
        yield from _bars(console)


def leads() -> bool:
    """Whether this process speaks to the user: of those that torchrun starts, the first does."""
    return os.environ.get("RANK", "0") == "0"


class _OnConsole(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(record.getMessage(), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _messages_on(console: Console) -> Iterator[None]:
    """Show what our parts log, one line a message, above the bars."""
    handler = _OnConsole(console)
    logger = logging.getLogger("allocator")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _bars(console: Console) -> Iterator[progress.Progress]:
    if not console.is_terminal:
        begun: set[str] = set()

        def tell(what: str, _share: float) -> None:
            if what not in begun:
                begun.add(what)
                print(f"{what} ...", file=sys.stderr, flush=True)

        yield tell
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def draw(what: str, share: float) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=1.0)
            bars.update(tasks[what], completed=share)

        yield draw
