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
from allocator.model.architectures import ExpertLayout
from allocator.model.shape import ModelShape

__all__ = ["ExpertMatrix", "matrices_of", "unstacked"]

_GATE_UP = ("experts.{e}.gate_proj", "experts.{e}.up_proj")
_STACKS = {
    "experts.gate_up_proj": _GATE_UP,
    "experts.down_proj": ("experts.{e}.down_proj",),
    "input_linear.weight": _GATE_UP,  # Granite
    "output_linear.weight": ("experts.{e}.down_proj",),
}
"""End of the name of a stack -> the modules whose rows it has, one after the other."""


def matrices_of(stack: str, layout: ExpertLayout) -> tuple[str, ...]:
    """The modules, with `{e}` for the number of an expert, of which the tensor `stack` is made; none if it is no stack.

    Interleaved rows of gate and up are one module: what is fused in the files, and in vLLM, stays so.
    """
    for end, parts in _STACKS.items():
        if stack.endswith(f".{end}"):
            if layout == "interleaved" and parts == _GATE_UP:
                parts = ("experts.{e}.gate_up_proj",)
            return tuple(stack.removesuffix(end) + part for part in parts)
    return ()


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
    transposed = layout != "rows"
    found = dict(stored)
    for name, stack in stored.items():
        modules = matrices_of(name, layout)
        block = re.search(r"\.(\d+)\.", name)
        first = kinds.get(re.sub(r"\.\d+\.", ".{i}.", modules[0], count=1)) if modules else None
        if block is None or first is None:
            continue
        rows, columns = first.shape
        whole = (rows * len(modules), columns)
        if stack.shape != (first.experts, *(reversed(whole) if transposed else whole)):
            continue
        del found[name]
        for expert in range(first.experts):
            for number, module in enumerate(modules):
                matrix = module.replace("{e}", str(expert)) + ".weight"
                found[matrix] = ExpertMatrix(
                    name=matrix,
                    dtype=stack.dtype,
                    shape=first.shape,
                    path=stack.path,
                    start=stack.start + (expert * prod(whole) + number * prod(first.shape)) * DTYPE_BYTES[stack.dtype],
                    stack=stack,
                    expert=expert,
                    first_row=number * rows,
                    transposed=transposed,
                )
    return found
