"""Tables and JSON on stdout, progress on stderr."""

import csv
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import progress as bars
from rich.console import Console, RenderableType
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from allocator.run.progress import Progress, Standing, Tracker, silent
from allocator.run.progress_lines import ProgressLines, amount_done, json_line, keep_telling, left, text_line

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
def show_progress(form: str | None = None) -> Iterator[Progress]:
    """Progress on stderr, in the `form` of --progress; None: a bar on a terminal, else lines. Libraries' own bars are
    turned off."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    console = Console(stderr=True)
    if not leads():
        yield silent
        return
    form = form or ("bar" if console.is_terminal else "lines")
    with _messages_on(console, logging.WARNING if form == "none" else logging.INFO, as_json=form == "json"):
        if form == "none":
            yield silent
        elif form == "bar":
            with _bars(console) as progress:
                yield progress
        else:
            lines = ProgressLines(_print_line, json_line if form == "json" else text_line)
            with keep_telling(lines):
                yield lines.tracker


def leads() -> bool:
    """Whether this process speaks to the user: of those that torchrun starts, the first does."""
    return os.environ.get("RANK", "0") == "0"


class _OnConsole(logging.Handler):
    def __init__(self, console: Console, as_json: bool) -> None:
        super().__init__()
        self._console, self._as_json = console, as_json

    def emit(self, record: logging.LogRecord) -> None:
        if self._as_json:
            _print_line(json.dumps({"message": record.getMessage()}))
        else:
            self._console.print(record.getMessage(), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _messages_on(console: Console, level: int, as_json: bool) -> Iterator[None]:
    """Show what our parts log, one line a message, above the bars."""
    handler = _OnConsole(console, as_json)
    logger = logging.getLogger("allocator")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


def _print_line(line: str) -> None:
    sys.stderr.write(f"{line}\n")  # in one piece: the thread that keeps telling writes too
    sys.stderr.flush()


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    """A bar a step; those of steps that ended stay, with what was done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[told]}"),
    )
    with bars.Progress(*columns, console=console) as drawn:
        tasks: dict[tuple[int, str], Any] = {}
        amounts: dict[Any, str] = {}  # of steps that have not ended

        def end() -> None:
            for ended, amount in amounts.items():
                drawn.update(ended, completed=1.0, told=amount)
                drawn.stop_task(ended)
            amounts.clear()

        def draw(standing: Standing) -> None:
            key = standing.number, standing.step
            if key not in tasks:
                end()
                tasks[key] = drawn.add_task(standing.step, total=1.0, told="")
            parts = [amount_done(standing)] if standing.unit else []
            amounts[tasks[key]] = "".join(parts)
            drawn.update(tasks[key], completed=standing.share, told=", ".join([*parts, *left(standing)]))

        yield Tracker(draw)
        end()
