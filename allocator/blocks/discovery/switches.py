"""Tensors that a model has for some values of a config key only: keys that are true or false, and sizes left out."""

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import fields, replace
from typing import Any

from allocator.blocks.discovery.probes import Probe
from allocator.blocks.discovery.tensors import ProbedTensor, probed_tensors
from allocator.blocks.discovery.told import MAY_BE_ZERO, value_of
from allocator.contract.errors import InputError
from allocator.model.derived_sizes import DERIVED
from allocator.model.expert_stacks import matrices_of

__all__ = ["with_switches"]

_NO_SWITCHES = ("tie_word_embeddings", "use_cache", "return_dict", "is_encoder_decoder", "output_hidden_states")
_SIZES_OF_EXPERTS = ("num_experts", "moe_intermediate_size")
"""Left out, there are no experts; another key says that."""
_COUNTS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def with_switches(
    kind: Any, sizes: Container[str], probes: list[Probe], build: Callable[..., list[Probe]]
) -> tuple[list[ProbedTensor], set[str]]:
    """The tensors of the model, and those that it has, or has in another shape, for another value of a key; and the
    keys that say so. `build(changes, count)` makes probes of the config class `kind` with other values."""
    usual = {(t.name, t.blocks): t for t in probed_tensors(probes)}
    gained: list[ProbedTensor] = []
    used: set[str] = set()
    everywhere = _has_experts_everywhere(usual.values())
    for key, other in _switches(kind, sizes, probes[0], everywhere):
        if not _matters({key: other}, probes[0], build):
            continue
        changed = {(t.name, t.blocks): t for t in probed_tensors(build({key: other}))}
        used.add(key)
        lost = not other
        here = {p for p, t in usual.items() if p not in changed or t.shape != changed[p].shape}
        new = [t for place, t in changed.items() if place not in usual or place in here]
        for place in here:
            tensor = usual[place]
            usual[place] = replace(tensor, when=key) if lost else replace(tensor, unless=key)
        gained += [replace(t, unless=key) if lost else replace(t, when=key) for t in new]
    return [*usual.values(), *gained], used


def _has_experts_everywhere(tensors: Iterable[ProbedTensor]) -> bool:
    with_experts = {b for t in tensors if "{e}" in t.name or matrices_of(t.name, "rows") for b in t.blocks}
    return with_experts == {b for t in tensors for b in t.blocks}


def _switches(
    kind: Any, sizes: Container[str], first: Probe, experts_everywhere: bool
) -> Iterator[tuple[str, bool | int | None]]:
    """Keys that are true or false, those of sizes that may be left out, and the number of experts that all blocks have,
    with the other value of each."""
    kept = ("head_dim", "num_key_value_heads", *_SIZES_OF_EXPERTS)
    zeros = (*MAY_BE_ZERO, *(_COUNTS_OF_EXPERTS if experts_everywhere else ()))
    computed_from = {key for size in DERIVED.values() for key in size.of}
    for key in fields(kind):
        value = value_of(first.config, key.name)
        of_two_values = isinstance(value, bool) and "str" not in str(key.type)
        if of_two_values and key.name not in (*_NO_SWITCHES, *computed_from):
            yield key.name, not value
        elif key.name in zeros and key.name in sizes:
            yield key.name, 0
        elif key.name in sizes and "None" in str(key.type) and key.name not in kept:
            yield key.name, None


def _matters(change: dict[str, Any], first: Probe, build: Callable[..., list[Probe]]) -> bool:
    """Whether the model has other tensors, or of other shapes, with another value of a key."""
    try:
        (changed,) = build(change, 1)
    except InputError:
        return False
    for key, other in change.items():
        if other is None and value_of(changed.config, key) is not None:
            return False  # the class computes it, and writes what it has computed
    # No experts at all in blocks that are made for them is a model that nobody has.
    return changed.stored != first.stored and all(map(all, changed.stored.values()))
