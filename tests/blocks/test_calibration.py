"""Calibration text comes from the files that people have, and is refused clearly otherwise."""

import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allocator.blocks.calibration import calibration_from_model, calibration_from_python, calibration_from_text
from allocator.blocks.calibration.files import sample_pieces
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


def test_of_a_large_file_a_sample_from_all_over_it_is_read(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("allocator.blocks.calibration.files.PIECE_CHARACTERS", 64)
    monkeypatch.setattr("allocator.blocks.calibration.sequences._LEAST_PIECES", 16)
    path = tmp_path / "large.txt"
    path.write_text("".join(chr(33 + i // 200) * 200 for i in range(0, 12_000, 200)))  # a letter a stretch
    calibration = calibration_from_text(tiny_model("llama"), [path], 8, 8, seed=0)
    assert len(calibration.token_ids.unique()) > 4
    again = calibration_from_text(tiny_model("llama"), [path], 8, 8, seed=0)
    assert again.digest == calibration.digest


def test_samples_are_drawn_evenly_and_kept_in_order() -> None:
    pieces = [(str(i), True) for i in range(40)]
    counts = [0] * 40
    for seed in range(400):
        chosen = [int(text) for text, _ in sample_pieces(pieces, 10, seed)]
        assert chosen == sorted(chosen)
        assert len(set(chosen)) == 10
        for number in chosen:
            counts[number] += 1
    assert 60 < min(counts) <= max(counts) < 150  # 100 expected
    assert sample_pieces(pieces, 100, 0) == pieces


def test_without_text_a_large_model_gets_that_of_python(tiny_model: Callable[[str], Path]) -> None:
    calibration = calibration_from_python(tiny_model("llama"), 16, 128, seed=0)
    assert calibration.token_ids.shape == (16, 128)
    assert len(calibration.token_ids.unique()) > 40
