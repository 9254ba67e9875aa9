"""Plans for models of the store, on a named, a measured or a visible device."""

from dataclasses import replace
from typing import Any

from allocator.contract.errors import InputError
from allocator.contract.manifest import Manifest
from allocator.contract.modules import kind_name
from allocator.contract.scores import Scores
from allocator.model.shape import read_shape
from allocator.plan import Device, Plan, PlannedWeights, PlanRequest, find_gpu, make_plan, memory_device
from allocator.plan.probe_records import lines_of_record
from allocator.plan.weights import sample_of
from allocator.sidecar.store import Entry
from allocator.solve import SolveSettings, solve_resident

__all__ = [
    "find_device",
    "plan_entry",
    "solve_for_plan",
]


def solve_for_plan(scores: Scores, settings: SolveSettings, plan: Plan, seconds: float = 60.0) -> Manifest:
    """The best assignment whose weights fit `plan.weight_budget_bytes` on the tightest rank.

    Raises InfeasibleBudgetError.
    """
    requested = f"plan for {plan.device.name}"
    return solve_resident(scores, settings, plan.residency, plan.weight_budget_bytes, requested, seconds)


def find_device(gpu: str | None, memory_bytes: int | None) -> Device:
    """The device of a catalogue name, or of an amount of memory, which counts if both are given.

    Raises InputError for an unknown name.
    """
    if memory_bytes is not None:
        return memory_device(memory_bytes)
    if gpu is None:
        raise InputError("no GPU is known; give its name or its memory")
    return find_gpu(gpu)


def plan_entry(entry: Entry, scores: Scores, device: Device, request: PlanRequest, formats: Any = None) -> Plan:
    """The plan of a model of the store; with `formats` that of a chosen assignment. Raises InputError.

    What `scores` have at 16 bits only, such as the vocabulary in those of older releases, is planned so.
    """
    fixed = {kind_name(name) for name, module in scores.modules.items() if len(module.candidates) == 1}
    shape = read_shape(entry.config)
    modules = tuple(
        replace(kind, why_16="the scores have no other") if kind_name(sample_of(kind)) in fixed else kind
        for kind in shape.modules
    )
    shape = replace(shape, modules=modules)
    weights = PlannedWeights(entry.group_size, entry.symmetric, formats)
    probe = lines_of_record(shape, device, request)
    return make_plan(shape, device, request, model=entry.name, weights=weights, probe=probe)
