"""An assignment as a grid: blocks down, kinds of modules across. What tables, heat maps and differences draw."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from allocator.contract.modules import parent_of, row_block_of

__all__ = ["Grid", "grid_of", "kind_of", "local_name", "short_kind", "short_name"]

_BLOCK_NUMBER = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
_EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Grid:
    """cells: block -> kind of module -> the values of its modules (several where a block has experts, or modules of
    some of their rows), in model order; outside: values of modules that stand in no block, by name."""

    kinds: list[str]
    cells: dict[int, dict[str, list[int]]]
    outside: dict[str, int]

    def mean(self, block: int, kind: str) -> float | None:
        """Mean value of the modules of a cell; None where the block has no such module."""
        values = self.cells[block].get(kind)
        return float(Fraction(sum(values), len(values))) if values else None


def grid_of(values: Mapping[str, int]) -> Grid:
    """Sort values by module name into a grid. Experts of one layer and projection share a cell."""
    cells: dict[int, dict[str, list[int]]] = {}
    outside: dict[str, int] = {}
    for name, value in values.items():
        match = _BLOCK_NUMBER.match(name)
        if match is None:
            outside[name] = value
        else:
            cells.setdefault(int(match[2]), {}).setdefault(kind_of(match[3]), []).append(value)
    kinds = list(dict.fromkeys(kind for row in cells.values() for kind in row))
    return Grid(kinds, dict(sorted(cells.items())), outside)


def local_name(name: str) -> str:
    """A module's name inside its block: `model.layers.3.self_attn.q_proj` -> `self_attn.q_proj`."""
    match = _BLOCK_NUMBER.match(name)
    return name if match is None else match[3]


def kind_of(local: str) -> str:
    """The local name of the parent without the number of the expert: `mlp.experts.5.up_proj` -> `mlp.experts.up_proj`,
    `mlp.up_proj.rows.3` -> `mlp.up_proj`."""
    return _EXPERT_NUMBER.sub(".experts.", f".{parent_of(local)}")[1:]


def short_name(local: str) -> str:
    """The last part of a name, without what all have in common: `self_attn.q_proj` -> `q`, `up_proj.rows.3` ->
    `up.3`."""
    block = row_block_of(local)
    if block is not None:
        return f"{short_name(block[0])}.{block[1]}"
    return local.rsplit(".", 1)[-1].removesuffix("_proj")


def short_kind(kind: str) -> str:
    """A kind as a column's head, `x.` in front of what every expert has: `mlp.experts.up_proj` -> `x.up`."""
    return f"x.{short_name(kind)}" if ".experts." in f".{kind}" else short_name(kind)
