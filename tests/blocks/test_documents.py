"""Calibration files as users have them: read as what they are, or refused with the place and the reason."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from allocator.blocks.calibration.files import pieces_of_files
from allocator.contract.errors import InputError

LINES = [f"This is line {i} of the text." for i in range(4)]
ROWS = [{"text": line} for line in LINES]
JSONL = "\n".join(json.dumps(row) for row in ROWS)
SAID = [{"role": "user", "content": LINES[0]}, {"role": "assistant", "content": LINES[1]}]
SHAREGPT = [{"from": "human", "value": LINES[0]}, {"from": "gpt", "value": LINES[1]}]


def render(messages: Sequence[dict[str, Any]]) -> str:
    return "|".join(f"{m['role']}:{m['content']}" for m in messages)


def read(path: Path, content: str | bytes) -> list[str]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [text for text, _ends in pieces_of_files([path], render)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("keyed.json", json.dumps({f"document-{i}": row for i, row in enumerate(ROWS)})),
        ("wrapped.json", json.dumps({"version": 1, "data": ROWS})),
        ("columns.json", json.dumps({"text": LINES, "id": [1, 2, 3, 4]})),
        ("lines.json", JSONL),
        ("a.JSONL", JSONL),
        ("a.ndjson", JSONL),
        ("mark.jsonl", "\ufeff" + JSONL),
        ("ends.jsonl", JSONL.replace("\n", "\r\n") + "\r\n\r\n"),
        ("wide.jsonl", JSONL.encode("utf-16")),
        ("a.jsonl.gz", gzip.compress(JSONL.encode())),
        ("a.csv", "id,text\n" + "\n".join(f"{i},{line}" for i, line in enumerate(LINES))),
        ("a.tsv", "text\tid\n" + "\n".join(f"{line}\t1" for line in LINES)),
    ],
)
def test_every_kind_of_file_gives_its_documents(name: str, content: str | bytes, tmp_path: Path) -> None:
    assert read(tmp_path / name, content) == LINES


@pytest.mark.parametrize(
    "record",
    [
        {"messages": SAID},
        {"prompt_id": "x", "prompt": LINES[0], "messages": SAID},
        {"conversations": SHAREGPT},
        {"prompt": LINES[0], "completion": LINES[1]},
        {"prompt": SAID[:1], "completion": SAID[1:]},
        {"messages": [SAID[0], {"role": "assistant", "content": [{"type": "text", "text": LINES[1]}]}]},
    ],
)
def test_chats_are_rendered_by_the_template(record: dict[str, Any], tmp_path: Path) -> None:
    assert read(tmp_path / "chat.jsonl", json.dumps(record)) == [f"user:{LINES[0]}|assistant:{LINES[1]}"]
    assert read(tmp_path / "chat.json", json.dumps([record])) == [f"user:{LINES[0]}|assistant:{LINES[1]}"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", JSONL + '\n{"text": null}', 'line 5: its "text" is null'),
        ("a.jsonl", JSONL + '\n{"text": "half', "line 5: no JSON"),
        ("a.jsonl", '{"id": 1, "body": "x"}', 'line 1: an object with the fields "id", "body"'),
        ("a.jsonl", r'{"text": "\ud800"}', "line 1: half a surrogate pair"),
        ("a.jsonl", '{"conversations": [{"from": "alien", "value": "x"}]}', "line 1: message 1 .* is from 'alien'"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "line 1: .* no text"),
        ("a.json", '[{"text": "x"}, 7]', "item 2: a number"),
        ("a.json", '{"train": [1], "test": [2]}', 'an object with the fields "train", "test"'),
        ("a.json", "", "line 1: no JSON"),
        ("a.csv", "id,body\n1,x", "line 1: the columns are id, body"),
        ("a.txt", b"plain\n" + "café".encode("latin-1"), "line 2 is not UTF-8 .*0xe9"),
        ("a.txt", "", "no text in it"),
        ("a.txt", "\n \n" * 30, "no text in it"),
        ("a.txt", b"\0" * 300, "NUL characters"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.parquet", b"PAR1", ".jsonl"),
        ("a.jsonl.zst", b"x", "unpack it first"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(
    name: str, content: str | bytes, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said) as error:
        read(tmp_path / name, content)
    assert str(tmp_path / name) in str(error.value)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        list(pieces_of_files([tmp_path], render))
