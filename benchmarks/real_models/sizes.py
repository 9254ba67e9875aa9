"""Bytes of a model on disk, counted alike for every format."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

__all__ = ["Sizes", "sizes_of"]

_BLOCK_LINEAR = re.compile(r"^(model\.layers|blk)\.\d+\.(?!.*norm).*$")
_VOCABULARY = ("model.embed_tokens.", "token_embd.", "lm_head.", "output.")
_BIASES = (".bias",)


@dataclass(frozen=True)
class Sizes:
    """Bytes of the weight files, of all tensors in them, and of the linear modules of the blocks and the lm_head with
    their scales and zero points (a tied embedding is the head); bits_per_weight is of those.
    """

    file_bytes: int
    tensor_bytes: int
    layers_and_head_bytes: int
    bits_per_weight: float

    def record(self) -> dict[str, float]:
        return asdict(self)


def sizes_of(tensors: Mapping[str, int], files: Iterable[int], weights: int, tied: bool) -> Sizes:
    """`tensors`: bytes by name, in names of Hugging Face or of GGUF; `files`: bytes of the weight files; `weights`: how
    many weights layers and head have."""
    counted = sum(
        nbytes
        for name, nbytes in tensors.items()
        if not name.endswith(_BIASES) and (_BLOCK_LINEAR.match(name) or name.startswith(_heads(tied)))
    )
    return Sizes(sum(files), sum(tensors.values()), counted, 8 * counted / weights)


def _heads(tied: bool) -> tuple[str, ...]:
    return _VOCABULARY if tied else ("lm_head.", "output.")
