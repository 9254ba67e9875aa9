"""The matrices of experts where the files have those of all experts of a block in one tensor.

transformers writes the experts of one architecture one by one or stacked, from release to release; published models of
the same kind have either.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from allocator.contract.layout import DTYPE_BYTES
from allocator.contract.safetensors_file import StoredTensor
from allocator.model.shape import ModelShape

__all__ = ["STACKS", "ExpertMatrix", "unstacked"]

STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Name of a stack `[experts, rows, in_features]` -> the matrices whose rows it has, one after the other."""


@dataclass(frozen=True)
class ExpertMatrix(StoredTensor):
    """Rows from `first_row` of `stack[expert]`: neighbouring bytes of the file, and so a tensor of its own."""

    stack: StoredTensor
    expert: int
    first_row: int

    @property
    def in_files(self) -> tuple[StoredTensor, ...]:
        """Itself, so that a model is the same however its experts are stored; the stack where that is quantized."""
        return self.stack.in_files if self.stack.in_files != (self.stack,) else (self,)


def unstacked(stored: Mapping[str, StoredTensor], shape: ModelShape) -> dict[str, StoredTensor]:
    """The tensors of the files, stacks that `shape` knows as single matrices replaced by these.

    A stack of another layout stays, and then the matrices are missing.
    """
    kinds = {kind.name: kind for kind in shape.modules if kind.experts}
    found = dict(stored)
    for name, stack in stored.items():
        parent, _, leaf = name.rpartition(".")
        parts = STACKS.get(leaf, ())
        block = re.search(r"\.(\d+)\.", parent)
        first = kinds.get(re.sub(r"\.\d+\.", ".{i}.", parent, count=1) + f".{{e}}.{parts[0]}") if parts else None
        if block is None or first is None:
            continue
        rows, columns = first.shape
        if stack.shape != (first.experts, rows * len(parts), columns):
            continue
        del found[name]
        for expert in range(first.experts):
            for number, part in enumerate(parts):
                matrix = f"{parent}.{expert}.{part}.weight"
                found[matrix] = _matrix(stack, matrix, expert * len(parts) + number, first.shape)
    return found


def _matrix(stack: StoredTensor, name: str, number: int, shape: tuple[int, int]) -> ExpertMatrix:
    """The matrix `number` of those of `shape` that lie one after the other in `stack`."""
    first = number * shape[0]
    return ExpertMatrix(
        name=name,
        dtype=stack.dtype,
        shape=shape,
        path=stack.path,
        start=stack.start + number * prod(shape) * DTYPE_BYTES[stack.dtype],
        stack=stack,
        expert=first // stack.shape[1],
        first_row=first % stack.shape[1],
    )
