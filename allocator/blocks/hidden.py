"""Hidden states between blocks, on disk as memory-mapped files, so that the page cache and not the heap holds them."""

from pathlib import Path

import torch
from torch import Tensor

__all__ = ["HiddenStates"]


class HiddenStates:
    """The teacher's states before block 0, 1, ..., and after the last: one float32 file `[S, T, D]` each."""

    def __init__(self, folder: Path, sequences: int, length: int, width: int) -> None:
        self.folder = folder
        self.shape = (sequences, length, width)
        folder.mkdir(parents=True, exist_ok=True)

    def boundary(self, index: int) -> Tensor:
        """The states before block `index`, mapped for reading and writing."""
        path = self.folder / f"states-{index:04d}.f32"
        size = self.shape[0] * self.shape[1] * self.shape[2]
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(self.shape)

    def clear(self) -> None:
        for path in self.folder.glob("states-*.f32"):
            path.unlink()
