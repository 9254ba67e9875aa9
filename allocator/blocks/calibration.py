"""Calibration sequences: token ids from text files, or sampled from the model itself."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allocator.blocks.texts import PIECE_CHARACTERS, Piece, pieces_of_files, pieces_of_python, sample_pieces
from allocator.contract.digest import digest_bytes
from allocator.contract.errors import InputError
from allocator.progress import Progress, silent

__all__ = ["Calibration", "calibration_from_model", "calibration_from_python", "calibration_from_text"]

_SURPLUS = 4  # so many times the text that is needed is tokenised, for windows from all over it
_CHARACTERS_A_TOKEN = 6
_LEAST_PIECES = 1000


@dataclass(frozen=True)
class Calibration:
    """token_ids: int64 `[sequences, length]`; source: what they came from, for the record."""

    token_ids: Tensor
    source: str

    @property
    def digest(self) -> str:
        return digest_bytes(self.token_ids.to(torch.int64).contiguous().numpy().tobytes())


def _windows(folder: Path, pieces: Iterable[Piece], sequences: int, length: int, seed: int, source: str) -> Calibration:
    """`sequences` windows of `length` tokens, drawn without overlap from a sample of the pieces, in random order."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    enough = max(_LEAST_PIECES, _SURPLUS * sequences * length * _CHARACTERS_A_TOKEN // PIECE_CHARACTERS)
    ids: list[int] = []
    for piece, ends in sample_pieces(pieces, enough, seed):
        ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if ends:
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
    """Sequences from text files of any size, with the tokenizer of the model in `folder`."""
    return _windows(folder, pieces_of_files(paths), sequences, length, seed, ", ".join(p.name for p in paths))


def calibration_from_python(folder: Path, sequences: int, length: int, seed: int) -> Calibration:
    """Sequences from the documentation and sources of Python, for when no text is given for a large model."""
    return _windows(folder, pieces_of_python(), sequences, length, seed, "documentation and sources of Python")


def calibration_from_model(
    folder: Path, sequences: int, length: int, seed: int, progress: Progress = silent
) -> Calibration:
    """Sequences that the model itself writes at temperature 1, for when no text is given; it must fit into memory."""
    progress.begin("opening the model")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    progress.begin("writing text", length - 1, "token")

    def told(ids: Tensor, *_scores: Any, **_: Any) -> Tensor:
        progress.advance()
        return torch.zeros(len(ids), dtype=torch.bool)  # go on

    start = model.config.bos_token_id
    start = start[0] if isinstance(start, list) else start if start is not None else 0
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        tokens = model.generate(
            torch.full((sequences, 1), start),
            attention_mask=torch.ones(sequences, 1, dtype=torch.int64),
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            min_new_tokens=length - 1, max_new_tokens=length - 1, stopping_criteria=[told],
        )  # fmt: skip
    return Calibration(tokens[:, :length].clone(), "written by the model itself")
