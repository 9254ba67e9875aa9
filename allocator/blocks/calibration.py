"""Calibration sequences: token ids from text files, or sampled from the model itself."""

import json
import lzma
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from allocator.contract.digest import digest_bytes
from allocator.contract.errors import InputError

__all__ = [
    "Calibration",
    "calibration_from_model",
    "calibration_from_text",
    "read_texts",
    "sequences_of_text",
]


@dataclass(frozen=True)
class Calibration:
    """token_ids: int64 `[sequences, length]`; source: what they came from, for the record."""

    token_ids: Tensor
    source: str

    @property
    def digest(self) -> str:
        return digest_bytes(self.token_ids.to(torch.int64).contiguous().numpy().tobytes())


def read_texts(path: Path) -> list[str]:
    """The documents of a .txt/.raw (one document), .jsonl (objects with "text") or .json (list) file, plain or .xz."""
    try:
        content = path.read_bytes()
        text = (lzma.decompress(content) if path.suffix == ".xz" else content).decode("utf-8")
        kind = path.with_suffix("").suffix if path.suffix == ".xz" else path.suffix
        if kind == ".jsonl":
            return [json.loads(line)["text"] for line in text.splitlines() if line.strip()]
        if kind == ".json":
            return [item if isinstance(item, str) else item["text"] for item in json.loads(text)]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, lzma.LZMAError) as error:
        raise InputError(
            f"{path}: cannot be read as calibration text ({type(error).__name__}: {error}); "
            'give UTF-8 text, .jsonl with {"text": ...} lines or a .json list'
        ) from None
    return [text]


def sequences_of_text(
    folder: Path, texts: list[str], sequences: int, length: int, seed: int, source: str
) -> Calibration:
    """`sequences` windows of `length` tokens, drawn without overlap from the tokenised texts, in random order."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # Whole books are cut for the tokenizer, which is quadratic in places; a cut costs one odd token in 20 000.
    pieces = [text[i : i + 20_000] for text in texts for i in range(0, len(text), 20_000)]
    ids: list[int] = []
    for piece in pieces:
        ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if len(pieces) == len(texts):
            ids += separator
    windows = len(ids) // length
    if windows < sequences:
        raise InputError(
            f"{source}: {len(ids)} tokens give {windows} sequences of {length}, {sequences} were asked for; "
            "give more text, or fewer or shorter sequences"
        )
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:sequences]
    tokens = torch.tensor(ids[: windows * length]).reshape(windows, length)[order]
    return Calibration(tokens, source)


def calibration_from_text(folder: Path, paths: list[Path], sequences: int, length: int, seed: int) -> Calibration:
    """Sequences from text files, with the tokenizer of the model in `folder`."""
    texts = [text for path in paths for text in read_texts(path)]
    return sequences_of_text(folder, texts, sequences, length, seed, ", ".join(p.name for p in paths))


def calibration_from_model(folder: Path, sequences: int, length: int, seed: int) -> Calibration:
    """Sequences that the model itself writes at temperature 1, for when no text is given; it must fit into memory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    start = model.config.bos_token_id
    start = start[0] if isinstance(start, list) else start if start is not None else 0
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        tokens = model.generate(
            torch.full((sequences, 1), start),
            attention_mask=torch.ones(sequences, 1, dtype=torch.int64),
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            min_new_tokens=length - 1, max_new_tokens=length - 1,
        )  # fmt: skip
    return Calibration(tokens[:, :length].clone(), "written by the model itself")
