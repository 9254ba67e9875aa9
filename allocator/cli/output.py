"""Tables and JSON on stdout, progress on stderr."""

import csv
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from allocator import progress

__all__ = ["print_csv", "print_json", "print_tables", "show_progress"]


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
    if not console.is_terminal:
        begun: set[str] = set()

        def tell(what: str, _share: float) -> None:
            if what not in begun:
                begun.add(what)
                print(f"{what} ...", file=sys.stderr, flush=True)

        yield tell
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def draw(what: str, share: float) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=1.0)
            bars.update(tasks[what], completed=share)

        yield draw
