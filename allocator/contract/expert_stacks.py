"""The matrices of experts in files that have those of all experts of a block in one tensor: which, and where.

transformers writes the experts of one architecture one by one or stacked, from release to release; published models of
the same kind have either.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["ExpertLayout", "StackedMatrix", "in_stack", "matrices_of"]

ExpertLayout = Literal["rows", "columns", "interleaved"]
"""How experts that are stored together are: `[experts, rows, in_features]`; `[experts, in_features, rows]`; or like the
latter, with the rows of gate and up in turns."""

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
class StackedMatrix:
    """The rows from `first_row` on, as many as `shape` `[out_features, in_features]` has, of expert `expert` of a
    stack: of its second dimension, or, where it is `transposed`, of its third."""

    module: str
    shape: tuple[int, int]
    expert: int
    first_row: int
    transposed: bool


def in_stack(
    stack: str, stack_shape: tuple[int, ...], module_shape: tuple[int, int], layout: ExpertLayout
) -> list[StackedMatrix]:
    """The matrices in the tensor `stack`, each of `module_shape`, expert after expert; none if it has another shape."""
    modules, transposed = matrices_of(stack, layout), layout != "rows"
    rows, columns = module_shape
    whole = (rows * len(modules), columns)
    if not modules or stack_shape[1:] != (whole[::-1] if transposed else whole):
        return []
    return [
        StackedMatrix(module.replace("{e}", str(expert)), module_shape, expert, number * rows, transposed)
        for expert in range(stack_shape[0])
        for number, module in enumerate(modules)
    ]
