"""What the name of a module says: its block, its kind, and of which module of the original model it is some rows.

Usually a module is one of the original's, all its rows. A module may also be cut into row blocks, modules of their own
that are named after their parent: `model.layers.0.mlp.up_proj.rows.3`. To whoever scores, solves or counts they are
modules like any other.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "Rows",
    "is_in_block",
    "kind_name",
    "layer_name",
    "original_shapes",
    "parent_of",
    "row_block_name",
    "row_block_of",
]

_ROWS = ".rows."
_NUMBER = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True)
class Rows:
    """Which rows of its parent a module has: `runs` runs of `length` neighbours, run i from `first + i * stride` on."""

    first: int
    length: int
    runs: int = 1
    stride: int = 0

    def __len__(self) -> int:
        return self.runs * self.length

    def numbers(self) -> list[int]:
        """By row of the module the row of its parent."""
        starts = (self.first + run * self.stride for run in range(self.runs))
        return [start + row for start in starts for row in range(self.length)]


def row_block_name(parent: str, number: int) -> str:
    """The name of row block `number` of module `parent`."""
    return f"{parent}{_ROWS}{number}"


def row_block_of(name: str) -> tuple[str, int] | None:
    """The parent of the row block `name` and its number there; None for a whole module."""
    parent, found, number = name.rpartition(_ROWS)
    return (parent, int(number)) if found and number.isdecimal() else None


def parent_of(name: str) -> str:
    """The module of the original model that `name` is, or is rows of."""
    block = row_block_of(name)
    return name if block is None else block[0]


def original_shapes(shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The shapes of the original model's modules, given those of the modules that they became, by name."""
    found: dict[str, tuple[int, int]] = {}
    for name, (rows, columns) in shapes.items():
        parent = parent_of(name)
        found[parent] = found.get(parent, (0, 0))[0] + rows, columns
    return found


def is_in_block(name: str) -> bool:
    """Whether the module is one of a decoder block: embedding and lm_head have no number in their names."""
    return _NUMBER.search(name) is not None


def kind_name(name: str) -> str:
    """The parent's name with every number between dots as `*`: `model.layers.3.mlp.up_proj` is
    `model.layers.*.mlp.up_proj`."""
    return _NUMBER.sub(".*", parent_of(name))


def layer_name(name: str, fused: str) -> str:
    """The layer `fused` that module `name` is joined into: `qkv_proj` beside `q_proj`. Row blocks of one number make a
    layer of their own: `up_proj.rows.3` is joined into `gate_up_proj.rows.3`."""
    block = row_block_of(name)
    layer = f"{parent_of(name).rpartition('.')[0]}.{fused}"
    return layer if block is None else row_block_name(layer, block[1])
