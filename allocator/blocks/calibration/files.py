"""Text read piece by piece: from files of any size, and from the Python installation where no text is given."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import random
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

from allocator.blocks.calibration.records import ALLOWED, Render, records_of, text_of
from allocator.contract.errors import InputError

__all__ = ["PIECE_CHARACTERS", "Piece", "pieces_of_files", "pieces_of_python", "sample_pieces"]

PIECE_CHARACTERS = 20_000
"""Whole books are cut for the tokenizer, which is quadratic in places; a cut costs one odd token in 20 000."""

Piece = tuple[str, bool]
"""A part of a document, and whether it is the last one."""

_COMPRESSED: dict[str, Callable[..., IO[Any]]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_READ = "plain text, .jsonl, .ndjson, .json, .csv and .tsv in UTF-8, also compressed as .xz, .gz or .bz2"
_UNPACK = "unpack it first"
_NOT_READ = dict.fromkeys((".zip", ".tar", ".tgz", ".zst", ".7z", ".rar"), _UNPACK) | dict.fromkeys(
    (".parquet", ".arrow", ".feather", ".orc"),
    "write it as .jsonl, for example with the package datasets: "
    """load_dataset("parquet", data_files=FILE)["train"].to_json("text.jsonl")""",
) | dict.fromkeys(
    (".pdf", ".doc", ".docx", ".epub", ".xlsx", ".pkl", ".npy", ".pt", ".bin", ".safetensors", ".gguf"), "it is no text"
)  # fmt: skip


def pieces_of_files(paths: Sequence[Path], render: Render) -> Iterator[Piece]:
    """The documents of files: of .jsonl and .ndjson one a line, of .json those of its list or object, of .csv and .tsv
    the column "text", of any other the whole text; also of compressed ones. Chats become text by `render`.

    Of a text, table or .jsonl file one piece or line is in memory at a time. Raises InputError with file, place and
    reason for what cannot be read so.
    """
    for path in paths:
        kinds = [suffix.lower() for suffix in path.suffixes]
        unpack = _COMPRESSED.get(kinds[-1]) if kinds else None
        kind = "" if len(kinds) < 1 + (unpack is not None) else kinds[-2 if unpack else -1]
        if path.is_dir():
            raise InputError(f"{path} is a folder; give the files in it, each with an option of its own")
        if kind in _NOT_READ:
            raise InputError(f"{path}: {kind} is not read, only {_READ}; {_NOT_READ[kind]}")
        try:
            with _text(path, unpack or open) as file:
                yield from _with_text(_pieces_of_file(file, kind, render))
        except UnicodeDecodeError:
            line, byte = _undecodable(path, unpack or open)
            raise InputError(
                f"{path}: line {line} is not UTF-8 (byte 0x{byte:02x}); convert the file, for example with "
                "iconv -f latin1 -t utf-8"
            ) from None
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"{path}: cannot be read as calibration text ({reason}); read are {_READ}") from None
        except (ValueError, RecursionError, csv.Error) as error:
            raise InputError(f"{path}: {error}") from None


def _text(path: Path, unpack: Callable[..., IO[Any]]) -> TextIO:
    """The file as text, in the encoding that a mark at its begin says, else in UTF-8."""
    binary: Any = unpack(path, "rb")
    head = binary.peek(4)[:4]
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8")
    return io.TextIOWrapper(binary, encoding=encoding)


def _undecodable(path: Path, unpack: Callable[..., IO[Any]]) -> tuple[int, int]:
    """Number of the first line that is not UTF-8, and the byte that is wrong."""
    with unpack(path, "rb") as binary:
        for number, line in enumerate(binary, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return number, line[error.start]
    return 1, 0xFF  # a mark of another encoding, and what is not of it


def _with_text(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """`pieces`. Raises ValueError at their end if all of them are blank."""
    blank = True
    for piece in pieces:
        blank = blank and not piece[0].strip()
        yield piece
    if blank:
        raise ValueError("there is no text in it; give a file with text")


def _pieces_of_file(file: TextIO, kind: str, render: Render) -> Iterator[Piece]:
    if kind in (".jsonl", ".ndjson"):
        yield from _pieces_of_records(_records_of_lines(file), render)
    elif kind == ".json":
        yield from _pieces_of_records(_records_of_json(file.read()), render)
    elif kind in (".csv", ".tsv"):
        yield from _pieces_of_records(_records_of_table(file, "," if kind == ".csv" else "\t"), render)
    else:
        yield from _pieces_of_text(file)


def _pieces_of_text(file: TextIO) -> Iterator[Piece]:
    piece = file.read(PIECE_CHARACTERS)
    while piece:
        if "\0" in piece:
            raise ValueError("it has NUL characters: it is no text, or UTF-16 without a mark; convert it to UTF-8")
        following = file.read(PIECE_CHARACTERS)
        yield piece, not following
        piece = following


def _pieces_of_records(records: Iterable[tuple[str, Any]], render: Render) -> Iterator[Piece]:
    for place, record in records:
        try:
            text = text_of(record, render)
            text.encode()  # halves of surrogate pairs can be written in JSON, and in nothing else
        except ValueError as error:
            reason = "half a surrogate pair in the text" if isinstance(error, UnicodeError) else error
            raise ValueError(f"{place}: {reason}") from None
        yield from _cut(text)


def _records_of_lines(lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {_no_json(error)}") from None


def _records_of_json(content: str) -> Iterator[tuple[str, Any]]:
    try:
        document = json.loads(content)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a record a line, whatever the file is called
            yield from _records_of_lines(content.split("\n"))
            return
        raise ValueError(f"line {error.lineno}: {_no_json(error)}") from None
    yield from records_of(document)


def _no_json(error: json.JSONDecodeError) -> str:
    return f"no JSON ({error.msg} at character {error.colno}); {ALLOWED}"


def _records_of_table(file: TextIO, delimiter: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader(file, delimiter=delimiter)
    columns = list(rows.fieldnames or ())
    if "text" not in columns:
        raise ValueError(f"line 1: the columns are {', '.join(columns)[:200] or 'none'}; one must be called text")
    for row in rows:
        yield f"line {rows.line_num}", {"text": row["text"]}


def _cut(text: str) -> Iterator[Piece]:
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
