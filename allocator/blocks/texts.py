"""Text read piece by piece: from files of any size, and from the Python installation where no text is given."""

import json
import lzma
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from allocator.contract.errors import InputError

__all__ = ["PIECE_CHARACTERS", "Piece", "pieces_of_files", "pieces_of_python", "sample_pieces"]

PIECE_CHARACTERS = 20_000
"""Whole books are cut for the tokenizer, which is quadratic in places; a cut costs one odd token in 20 000."""

Piece = tuple[str, bool]
"""A part of a document, and whether it is the last one."""


def pieces_of_files(paths: Sequence[Path]) -> Iterator[Piece]:
    """The documents of .txt/.raw (one document), .jsonl (objects with "text") and .json (list) files, plain or .xz.

    Of a text or .jsonl file one piece or line is in memory at a time. Raises InputError for a file that is none of
    these.
    """
    for path in paths:
        try:
            with (
                lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as file
            ):
                yield from _pieces_of_file(file, path)
        except (OSError, EOFError, UnicodeDecodeError, ValueError, KeyError, TypeError, lzma.LZMAError) as error:
            raise InputError(
                f"{path}: cannot be read as calibration text ({type(error).__name__}: {error}); "
                'give UTF-8 text, .jsonl with {"text": ...} lines or a .json list'
            ) from None


def _pieces_of_file(file: TextIO, path: Path) -> Iterator[Piece]:
    kind = path.with_suffix("").suffix if path.suffix == ".xz" else path.suffix
    if kind == ".jsonl":
        for line in file:
            if line.strip():
                yield from _cut(json.loads(line)["text"])
    elif kind == ".json":
        for item in json.load(file):
            yield from _cut(item if isinstance(item, str) else item["text"])
    else:
        piece = file.read(PIECE_CHARACTERS)
        while piece:
            following = file.read(PIECE_CHARACTERS)
            yield piece, not following
            piece = following


def _cut(text: str) -> Iterator[Piece]:
    if not isinstance(text, str):
        raise TypeError(f"a document is {type(text).__name__}, no text")
    for start in range(0, len(text), PIECE_CHARACTERS):
        yield text[start : start + PIECE_CHARACTERS], start + PIECE_CHARACTERS >= len(text)


def pieces_of_python() -> Iterator[Piece]:
    """The language reference that every Python brings along, and the sources of its standard library.

    English prose, examples and code, about 5 MB, the same wherever the same Python is: text for models that are too
    large to write their own. Raises InputError where the installation was stripped of it.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / "pydoc_data" / "topics.py", *sorted(folder.glob("*.py"))]
    there = [path for path in files if path.is_file()]
    if not there:
        raise InputError(f"{folder} has no sources to calibrate on; give --calibration FILE")
    for path in there:
        yield from _cut(path.read_text(encoding="utf-8", errors="replace").replace("\\n", "\n"))


def sample_pieces(pieces: Iterable[Piece], count: int, seed: int) -> list[Piece]:
    """All pieces if there are at most `count`; else `count` of them drawn evenly in one pass. In their order."""
    chosen: list[tuple[int, Piece]] = []
    draw = random.Random(seed)
    for number, piece in enumerate(pieces):
        if number < count:
            chosen.append((number, piece))
        elif (place := draw.randint(0, number)) < count:
            chosen[place] = (number, piece)
    return [piece for _, piece in sorted(chosen, key=lambda entry: entry[0])]
