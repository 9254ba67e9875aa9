"""Plans for models of the store, on a named, a measured or a visible device."""

from collections.abc import Sequence
from typing import Any

from allocator.contract.errors import InputError
from allocator.fitting import Device, Plan, PlanRequest, find_gpu, make_plan, memory_device
from allocator.fitting.catalogue import cuda_memory
from allocator.inventory.shape import read_shape
from allocator.sidecar.device import Device as Visible
from allocator.sidecar.entry import Entry

__all__ = ["device_of", "plan_entry", "visible_device"]

_SAME_MEMORY = 0.02


def device_of(gpu: str | None, memory_bytes: int | None) -> Device:
    """The device of a catalogue name, or of an amount of memory, which counts if both are given.

    Raises InputError for an unknown name.
    """
    if memory_bytes is not None:
        return memory_device(memory_bytes)
    if gpu is None:
        raise InputError("no GPU is known; give its name or its memory")
    return find_gpu(gpu)


def visible_device(devices: Sequence[Visible], ranks: int) -> Device:
    """The smallest of the visible GPUs as the planner wants it. Raises InputError when there are too few.

    A card of the catalogue is taken from there, with the memory that CUDA is known to see; another one, and a part of a
    card, is taken by its memory.
    """
    if len(devices) < ranks:
        raise InputError(f"{len(devices)} GPUs are visible, --tensor-parallel-size is {ranks}")
    smallest = min(devices[:ranks] if ranks > 1 else devices[:1], key=lambda d: d.memory_bytes)
    try:
        known = find_gpu(smallest.name)
    except InputError:
        known = None
    if known is not None and abs(known.total_bytes - smallest.memory_bytes) <= _SAME_MEMORY * known.total_bytes:
        return known
    capability = None
    if smallest.compute_capability:
        major, _, minor = smallest.compute_capability.partition(".")
        capability = int(major), int(minor or 0)
    return Device(
        name=smallest.name,
        total_bytes=smallest.memory_bytes,
        cuda_bytes=cuda_memory(smallest.memory_bytes >> 20),
        basis="formula",
        capability=capability,
    )


def plan_entry(entry: Entry, device: Device, request: PlanRequest, formats: Any = None) -> Plan:
    """The plan of a model of the store; with `formats` that of a chosen assignment. Raises InputError."""
    return make_plan(
        read_shape(entry.config), device, request, model=entry.name, group_size=entry.group_size,
        symmetric=entry.symmetric, formats=formats,
    )  # fmt: skip
