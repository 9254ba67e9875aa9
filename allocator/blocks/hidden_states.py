"""Hidden states between blocks, on disk as memory-mapped files, so that the page cache and not the heap holds them."""

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from allocator.contract.outputs import is_out_of_room

__all__ = ["HiddenStates"]


class HiddenStates:
    """States before block 0, 1, ..., and after the last, or gradients at them: files of `dtype` `[S, T, D]`.

    float32 for states, whose errors are measured; bfloat16 is safe for gradients, which only weigh those errors.
    """

    def __init__(
        self, folder: Path, sequences: int, length: int, width: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.folder = folder
        self.shape = (sequences, length, width)
        self.dtype = dtype
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def boundary_bytes(self) -> int:
        """Bytes of the file of one boundary."""
        return self.shape[0] * self.shape[1] * self.shape[2] * self.dtype.itemsize

    def boundary(self, index: int) -> Tensor:
        """The states before block `index`, mapped for reading and writing.

        Pages that were touched count as the process's memory for as long as the tensor lives: map it anew for each
        batch when there are many.
        """
        size = self.shape[0] * self.shape[1] * self.shape[2]
        path = self._path(index)
        self._reserve(path)
        return torch.from_file(str(path), shared=True, size=size, dtype=self.dtype).view(self.shape)

    def _reserve(self, path: Path) -> None:
        """Take the file's room on the disk: in a mapping of a sparse file a full disk would kill the process."""
        if path.exists() and path.stat().st_size >= self.boundary_bytes:
            return
        with path.open("ab") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, self.boundary_bytes)
            except OSError as error:
                if not is_out_of_room(error):
                    return  # a file system that cannot; torch makes the file
                path.unlink()
                raise

    def settle(self, index: int) -> None:
        """Return once the states before block `index` are on the disk."""
        with self._path(index).open("rb") as file:
            os.fsync(file.fileno())

    def forget(self, index: int) -> None:
        """Delete the states before block `index`."""
        self._path(index).unlink(missing_ok=True)

    def beside(self, name: str, dtype: torch.dtype = torch.float32) -> "HiddenStates":
        """A store of the same shape in the sub-folder `name`."""
        return HiddenStates(self.folder / name, *self.shape, dtype=dtype)

    def first(self, sequences: int) -> "HiddenStates":
        """The same files, their first `sequences` alone."""
        return HiddenStates(self.folder, min(sequences, self.shape[0]), *self.shape[1:], dtype=self.dtype)

    def remove(self) -> None:
        """Delete the files and the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, index: int) -> Path:
        return self.folder / f"states-{index:04d}.{'f32' if self.dtype == torch.float32 else 'bf16'}"
