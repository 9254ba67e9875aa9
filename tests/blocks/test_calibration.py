"""Calibration text comes from the files that people have, and is refused clearly otherwise."""

import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allocator.blocks import calibration_from_model, calibration_from_text
from allocator.contract.errors import InputError

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


def write(path: Path, kind: str) -> Path:
    path = path / f"text.{kind}"
    content = {"txt": TEXT, "jsonl": json.dumps({"text": TEXT}) + "\n", "json": json.dumps([TEXT])}[kind.split(".")[0]]
    if kind.endswith("xz"):
        path.write_bytes(lzma.compress(content.encode()))
    else:
        path.write_text(content)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "txt.xz", "jsonl.xz"])
def test_every_kind_of_file_gives_the_same_windows(
    kind: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    calibration = calibration_from_text(tiny_model("llama"), [write(tmp_path, kind)], 8, 64, seed=0)
    assert calibration.token_ids.shape == (8, 64)
    reference = calibration_from_text(tiny_model("llama"), [write(tmp_path, "txt")], 8, 64, seed=0)
    assert calibration.digest == reference.digest


def test_too_little_text_says_how_much_there_is(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="28 sequences of 64, 1000 were asked for"):
        calibration_from_text(tiny_model("llama"), [write(tmp_path, "txt")], 1000, 64, seed=0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"{broken"),
        ("a.jsonl", b'{"other": 1}'),
        ("a.json", b"[1]"),
        ("a.txt", b"\xff\xfe"),
        ("a.txt.xz", b"no"),
    ],
)
def test_unreadable_text_is_refused(
    name: str, content: bytes, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        calibration_from_text(tiny_model("llama"), [tmp_path / name], 1, 8, seed=0)


def test_the_model_writes_its_own_text_reproducibly(tiny_model: Callable[[str], Path]) -> None:
    first = calibration_from_model(tiny_model("qwen3"), 4, 16, seed=3)
    again = calibration_from_model(tiny_model("qwen3"), 4, 16, seed=3)
    other = calibration_from_model(tiny_model("qwen3"), 4, 16, seed=4)
    assert first.token_ids.shape == (4, 16)
    assert torch.equal(first.token_ids, again.token_ids)
    assert not torch.equal(first.token_ids, other.token_ids)
