"""Calibration sequences: token ids from text files, or sampled from the model itself.

Every sequence that anything is learned, measured or refined on is made here. Each begins as the model's tokenizer
begins a text: with BOS where it puts one, as Gemma and Llama do. Without it such models are not what they were trained
to be, and what is measured on them says little of how they will be used.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from allocator.blocks.calibration.files import PIECE_CHARACTERS, Piece, pieces_of_files, pieces_of_python, sample_pieces
from allocator.blocks.calibration.self_written import write_tokens
from allocator.blocks.calibration.tokenizer import TextTokenizer
from allocator.contract.digest import digest_bytes
from allocator.contract.errors import InputError
from allocator.model.context_length import cut_to
from allocator.run.progress import Progress, silent

__all__ = [
    "FULL_FROM_PARAMETERS",
    "Calibration",
    "calibration_amount",
    "calibration_from_model",
    "calibration_from_python",
    "calibration_from_text",
]

_SEQUENCES, _LENGTH = 128, 2048
_LEAST_TOKENS, _TOKENS_A_ROOT = 8192, 32
_FEW_SEQUENCES, _SHORT = 32, 256

FULL_FROM_PARAMETERS = (_SEQUENCES * _LENGTH // _TOKENS_A_ROOT) ** 2
"""Models of so many have all sequences at their full length."""


def calibration_amount(
    parameters: int, longest: int | None, sequences: int | None = None, length: int | None = None
) -> tuple[int, int]:
    """Number and length of the calibration sequences for a model of so many `parameters` and `longest` positions.

    Where neither is given: 32 tokens for each unit of the root of the parameters, at least 8,192 and at most 128
    sequences of 2048, which every model from 67 million parameters on has. The root follows the width of a model, and
    the second moments of an input need so many tokens a feature. Fewer tokens come as 32 sequences of at least 256, so
    that they are of as many places. `docs/scale.md` has what that costs. A number that is given is kept, with 128 or
    2048 beside it; only a length that the model does not have is cut.
    """
    if sequences is not None or length is not None:
        return sequences or _SEQUENCES, cut_to(length or _LENGTH, longest)
    tokens = min(_SEQUENCES * _LENGTH, max(_LEAST_TOKENS, _TOKENS_A_ROOT * isqrt(parameters)))
    length = cut_to(min(_LENGTH, max(_SHORT, tokens // _FEW_SEQUENCES)), longest)
    return min(_SEQUENCES, -(-tokens // length)), length


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


def _windows(
    tokenizer: TextTokenizer, pieces: Iterable[Piece], sequences: int, length: int, seed: int, source: str
) -> Calibration:
    """`sequences` windows of `length` tokens, drawn without overlap from a sample of the pieces, in random order."""
    enough = max(_LEAST_PIECES, _SURPLUS * sequences * length * _CHARACTERS_A_TOKEN // PIECE_CHARACTERS)
    ids: list[int] = []
    begins = True
    for piece, ends in sample_pieces(pieces, enough, seed):
        ids += [*(tokenizer.prefix if begins else ()), *tokenizer.ids(piece), *(tokenizer.separator if ends else ())]
        begins = ends
    windows = _cut(ids, tokenizer.prefix, length)
    if len(windows) < sequences:
        raise InputError(
            f"{source}: {len(ids)} tokens give {len(windows)} sequences of {length}, {sequences} were asked for; "
            "give more text, or fewer or shorter sequences"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:sequences]
    return Calibration(torch.tensor([windows[i] for i in order.tolist()]), source)


def _cut(ids: Sequence[int], prefix: list[int], length: int) -> list[list[int]]:
    """`ids` in windows of `length`, each of which begins with `prefix`: its own where a text begins there."""
    if length <= len(prefix):
        raise InputError(
            f"sequences of {length} tokens are too short: the tokenizer puts {len(prefix)} before every text"
        )
    windows: list[list[int]] = []
    start = 0
    while start < len(ids):
        added = [] if list(ids[start : start + len(prefix)]) == prefix else prefix
        end = start + length - len(added)
        if end <= len(ids):
            windows.append([*added, *ids[start:end]])
        start = end
    return windows


def calibration_from_text(folder: Path, paths: list[Path], sequences: int, length: int, seed: int) -> Calibration:
    """Sequences from text files of any size, with the tokenizer of the model in `folder`.

    Raises InputError for a file that cannot be read as text, and for too little text.
    """
    tokenizer = TextTokenizer.of(folder)
    pieces = pieces_of_files(paths, tokenizer.render)
    return _windows(tokenizer, pieces, sequences, length, seed, ", ".join(p.name for p in paths))


def calibration_from_python(folder: Path, sequences: int, length: int, seed: int) -> Calibration:
    """Sequences from the documentation and sources of Python, for when no text is given for a large model."""
    source = "documentation and sources of Python"
    return _windows(TextTokenizer.of(folder), pieces_of_python(), sequences, length, seed, source)


def calibration_from_model(
    folder: Path, sequences: int, length: int, seed: int, progress: Progress = silent
) -> Calibration:
    """Sequences that the model itself writes at temperature 1, for when no text is given; it must fit into memory.

    They begin as the tokenizer begins a text. What generation_config.json says does not count.
    """
    return Calibration(write_tokens(folder, sequences, length, seed, progress), "written by the model itself")
