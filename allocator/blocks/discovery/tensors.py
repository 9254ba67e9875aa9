"""The tensors of an architecture, from probes of it in several sizes; and whether rules say the same."""

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from allocator.blocks.discovery.expressions import Trace
from allocator.blocks.discovery.probes import Probe
from allocator.contract.errors import InputError
from allocator.model.architectures import Architecture, ExpertLayout
from allocator.model.expert_stacks import matrices_of
from allocator.model.shape import shape_of

__all__ = ["ProbedTensor", "check_rules", "experts_of", "module_name", "numbered", "parent_name", "probed_tensors"]


@dataclass(frozen=True)
class ProbedTensor:
    """Tensors of one name up to numbers, of one shape in each probe, in some blocks (none: outside of them)."""

    name: str
    shape: tuple[Trace, ...]
    linear: bool
    blocks: tuple[int, ...]
    when: str | None = None
    unless: str | None = None


def probed_tensors(probes: list[Probe]) -> list[ProbedTensor]:
    """Tensors of one name and shape, and the blocks that have them."""
    first = probes[0]
    blocks: dict[tuple[str, tuple[Trace, ...], bool], set[int]] = {}
    for name in first.stored:
        if re.search(r"\.experts\.[1-9]\d*\.", name):
            continue
        shapes = [p.stored.get(name) for p in probes]
        if None in shapes:
            raise InputError(f"{type(first.config).__name__}: {name} is there in some sizes only")
        found: Any = shapes
        traces = tuple(zip(*found, strict=True))
        pattern = numbered(name, first)
        linear = name.removesuffix(".weight") in first.linear or ("{e}" in pattern and name.endswith(".weight"))
        match = re.match(re.escape(first.block_prefix) + r"\.(\d+)\.", name)
        blocks.setdefault((pattern, traces, linear), set()).update({int(match[1])} if match else set())
    return [ProbedTensor(name, shape, linear, tuple(sorted(where))) for (name, shape, linear), where in blocks.items()]


def numbered(name: str, of: Probe) -> str:
    """The name with {i} and {e} in the place of the numbers of block and expert."""
    name = re.sub(re.escape(of.block_prefix) + r"\.\d+\.", f"{of.block_prefix}.{{i}}.", name)
    return re.sub(r"\.experts\.\d+\.", ".experts.{e}.", name)


def module_name(tensor: ProbedTensor) -> str:
    return tensor.name.removesuffix(".weight")


def parent_name(name: str) -> str:
    """The module above that of the tensor `name`."""
    return name.removesuffix(".weight").rpartition(".")[0]


def experts_of(of: Probe) -> int:
    """How many experts its blocks with experts have."""
    stacks = [shape[0] for name, shape in of.stored.items() if len(shape) == 3 and matrices_of(name, "rows")]
    if stacks:
        return stacks[0]
    found = [re.search(r"\.experts\.(\d+)\.", name) for name in of.stored]
    return 1 + max(int(m[1]) for m in found if m)


def check_rules(rules: Architecture, of: Probe, architecture: str) -> None:
    """Raises InputError where `rules` do not say of a model what transformers makes of it."""
    config = of.config.to_dict() | {"architectures": [architecture]}
    shape = shape_of(architecture, rules, config)
    said: dict[str, tuple[int, ...]] = {}
    for module in shape.modules:
        for block in module.blocks or (0,):
            for expert in range(module.experts or 1):
                said[f"{module.name}.weight".replace("{i}", str(block)).replace("{e}", str(expert))] = module.shape
    said |= {name: other.shape for other in shape.others for name in other.names()}
    made = {
        name: size
        for name, size in _single(of.stored, said, "rows" if rules.experts is None else rules.experts.layout).items()
        if not (shape.tied and name == f"{of.head}.weight")
    }
    if odd := sorted(set(said.items()) ^ set(made.items())):
        name = odd[0][0]
        raise InputError(
            f"{architecture}: {name} is {made.get(name)} in transformers, {said.get(name)} by what was found"
        )


def _single(
    stored: dict[str, tuple[int, ...]], said: Container[str], layout: ExpertLayout
) -> dict[str, tuple[int, ...]]:
    """Shapes by name, with stacks of experts as single matrices where these are said to be there."""
    found = {}
    for name, size in stored.items():
        modules = matrices_of(name, layout)
        if not modules or f"{modules[0]}.weight".replace("{e}", "0") not in said:
            found[name] = size
            continue
        experts, rows, columns = size if layout == "rows" else (size[0], size[2], size[1])
        for module in modules:
            each = (rows // len(modules), columns)
            found |= {f"{module}.weight".replace("{e}", str(expert)): each for expert in range(experts)}
    return found
