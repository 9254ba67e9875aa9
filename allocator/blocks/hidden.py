"""Hidden states between blocks, on disk as memory-mapped files, so that the page cache and not the heap holds them."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["HiddenStates"]


class HiddenStates:
    """States before block 0, 1, ..., and after the last, or gradients at them: float32 files `[S, T, D]`."""

    def __init__(self, folder: Path, sequences: int, length: int, width: int) -> None:
        self.folder = folder
        self.shape = (sequences, length, width)
        folder.mkdir(parents=True, exist_ok=True)

    def boundary(self, index: int) -> Tensor:
        """The states before block `index`, mapped for reading and writing."""
        path = self.folder / f"states-{index:04d}.f32"
        size = self.shape[0] * self.shape[1] * self.shape[2]
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(self.shape)

    def beside(self, name: str) -> "HiddenStates":
        """An empty store of the same shape in the sub-folder `name`."""
        return HiddenStates(self.folder / name, *self.shape)

    def remove(self) -> None:
        """Delete the files and the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
