"""The matrices of experts that the files have in one tensor, as tensors of their own."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from allocator.contract.expert_stacks import ExpertLayout, in_stack, matrices_of
from allocator.contract.layout import DTYPE_BYTES
from allocator.contract.safetensors_file import StoredTensor
from allocator.model.shape import ModelShape

__all__ = ["ExpertMatrix", "matrices_of", "unstacked"]


@dataclass(frozen=True)
class ExpertMatrix(StoredTensor):
    """Output rows from `first_row` on of expert `expert` in `stack`: neighbouring bytes of the file, and so a tensor of
    its own, unless the stack is `transposed` (`[experts, in_features, rows]`)."""

    stack: StoredTensor
    expert: int
    first_row: int
    transposed: bool = False

    @property
    def in_files(self) -> tuple[StoredTensor, ...]:
        """Itself where it can be, so that a model is the same however its experts are stored; else the stack."""
        return self.stack.in_files if self.transposed or self.stack.in_files != (self.stack,) else (self,)


def unstacked(stored: Mapping[str, StoredTensor], shape: ModelShape) -> dict[str, StoredTensor]:
    """The tensors of the files, stacks that `shape` knows as single matrices replaced by these.

    A stack of another layout stays, and then the matrices are missing.
    """
    kinds = {kind.name: kind for kind in shape.modules if kind.experts}
    layout: ExpertLayout = "rows" if shape.experts is None else shape.experts.layout
    found = dict(stored)
    for name, stack in stored.items():
        modules = matrices_of(name, layout)
        block = re.search(r"\.(\d+)\.", name)
        first = kinds.get(re.sub(r"\.\d+\.", ".{i}.", modules[0], count=1)) if modules else None
        if block is None or first is None or stack.shape[0] != first.experts:
            continue
        matrices = in_stack(name, stack.shape, first.shape, layout)
        if not matrices:
            continue
        del found[name]
        for place, matrix in enumerate(matrices):
            tensor = f"{matrix.module}.weight"
            found[tensor] = ExpertMatrix(
                name=tensor,
                dtype=stack.dtype,
                shape=first.shape,
                path=stack.path,
                start=stack.start + place * prod(first.shape) * DTYPE_BYTES[stack.dtype],
                stack=stack,
                expert=matrix.expert,
                first_row=matrix.first_row,
                transposed=matrix.transposed,
            )
    return found
