"""What the solver processes do. Each keeps the scores that it used last; nothing else lives between two calls."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import OrderedDict
from multiprocessing.connection import wait
from typing import Any

from allocator.contract.amounts import parse_budget
from allocator.contract.errors import ContractError, InputError
from allocator.contract.manifest import Manifest, average_bits
from allocator.contract.scores import Scores
from allocator.plan import Plan, PlanRequest
from allocator.plan.fusion import fusion_for
from allocator.report.differences import compare, comparison_document
from allocator.report.recorded import recorded_loss, recorded_row
from allocator.sidecar.planning import find_device, plan_entry, solve_for_plan
from allocator.sidecar.schemas import (
    Allocation,
    AllocationRequest,
    MeasuredPoint,
    PlanHardware,
    SweepPoint,
    SweepRequest,
    SweepResult,
)
from allocator.sidecar.solved import Solved
from allocator.sidecar.store import Entry, Store, document_text
from allocator.solve import SolveSettings, solve_scores
from allocator.solve.many_budgets import UniformPlan, solve_budgets, uniform_plans
from allocator.solve.program import Program
from allocator.solve.request import parse_amount
from allocator.solve.units import Rules

__all__ = ["allocate", "begin", "diff", "plan", "sweep", "warm"]

_KEPT_SCORES = 4
_SWEEP_GAP = 1e-4
"""Of the predicted loss: a curve needs no proof of its last digits."""
_scores: OrderedDict[str, Scores] = OrderedDict()
_store: Store | None = None


def begin(store_url: str) -> None:
    """Run in each new process: it ends with the service, also when that is killed, and not by Ctrl-C before it."""
    global _store
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    _store = Store(store_url)


def warm() -> int:
    """Does nothing, in a process that has everything loaded then."""
    return os.getpid()


def allocate(
    identity: str,
    request_json: str,
    entry_json: str,
    plan_payload: dict[str, Any] | None,
    persist: bool,
    seconds: float,
) -> Solved:
    """Solve one request and, with `persist`, store it. If another process stored it meanwhile, its answer counts.

    `plan_payload` is the plan of a request with hardware: it gives the budget.
    """
    request = AllocationRequest.model_validate_json(request_json)
    entry = Entry.model_validate_json(entry_json)
    scores = _scores_of(entry.scores_digest)
    made = None if plan_payload is None else Plan.parse(plan_payload, "plan")
    settings = SolveSettings(
        budget=request.budget,
        average_bits=request.average_bits,
        rules=Rules(request.pins, request.ceilings, request.floors),
        fusion=fusion_for(request.fusion, made),
    )
    started = time.perf_counter()
    if made is None:
        manifest = solve_scores(scores, settings, seconds)
    else:
        manifest = solve_for_plan(scores, settings, made, seconds)
    taken = time.perf_counter() - started
    allocation = _allocation(identity, request, entry.name, scores, manifest, made)
    content = allocation.model_dump_json(exclude_none=True).encode()
    text = document_text(manifest).encode()
    if persist:
        backend = _opened().backend
        backend.create(f"manifests/{manifest.digest[7:]}.json", text)
        path = f"allocations/{identity[7:]}.json"
        if not backend.create(path, content):
            content = backend.read(path) or content
            digest = Allocation.model_validate_json(content).manifest_digest
            text = _opened().manifest_text(digest) or text
    proof = manifest.proof
    gap = 0.0 if proof is None or not proof.gap else proof.gap / max(abs(proof.objective), 1e-300)
    return Solved(content, text, taken, gap, proof is not None and proof.cut is True)


def plan(entry_json: str, hardware_json: str, manifest_text: bytes | None) -> dict[str, Any]:
    """The plan of a model on some hardware, with a manifest for that assignment."""
    entry = Entry.model_validate_json(entry_json)
    hardware = PlanHardware.model_validate_json(hardware_json)
    memory = None if hardware.gpu_memory is None else parse_budget(hardware.gpu_memory, "gpu_memory")
    request = PlanRequest(**hardware.model_dump(exclude={"gpu", "gpu_memory"}))
    formats = None
    if manifest_text is not None:
        manifest = Manifest.parse(json.loads(manifest_text), "manifest")
        if manifest.model.digest != entry.model.digest:
            raise InputError(f"the manifest is of model {manifest.model.digest}, {entry.name} is {entry.model.digest}")
        formats = manifest.modules
    made = plan_entry(entry, _scores_of(entry.scores_digest), find_device(hardware.gpu, memory), request, formats)
    return made.payload() | {"digest": made.digest}


def sweep(identity: str, request_json: str, scores_digest: str, name: str, measured: list[str]) -> bytes:
    """The Pareto curve as the answer of the API. `measured`: digests of stored manifests that say what was measured."""
    request = SweepRequest.model_validate_json(request_json)
    scores = _scores_of(scores_digest)
    low, high = scores.feasible_bytes()
    first = low if request.smallest is None else parse_amount(request.smallest, scores, "smallest")
    last = high if request.largest is None else parse_amount(request.largest, scores, "largest")
    if not low <= first < last:
        raise InputError(
            f"smallest {first} and largest {last} bytes: smallest must be at least {low} (the smallest assignment) "
            "and below largest"
        )
    steps = request.points - 1
    budgets = [first, *(round(first * (last / first) ** (i / steps)) for i in range(1, steps)), last]
    program = Program.of(scores, fusion=request.fusion)
    points = [
        SweepPoint(
            budget_bytes=point.budget_bytes, tensor_bytes=point.solution.tensor_bytes, average_bits=point.average_bits,
            predicted_loss=point.solution.objective, bound=point.solution.bound,
        )
        for point in solve_budgets(program, budgets, relative_gap=_SWEEP_GAP)
    ]  # fmt: skip
    uniform = {str(plan.num_bits): _uniform(plan) for plan in uniform_plans(scores)}
    result = SweepResult(
        id=identity,
        model=name,
        scores_digest=scores_digest,
        unit=scores.unit,
        points=points,
        uniform=uniform,
        measured=_measured(scores, measured),
    )
    return result.model_dump_json(exclude_none=True).encode()


def diff(before: bytes | dict[str, Any], after: bytes | dict[str, Any]) -> dict[str, Any]:
    """What changed between two manifests, with the losses of the scores they were solved from, if stored."""
    old, new = _manifest_of(before, "before"), _manifest_of(after, "after")
    scores = _scores_of(new.scores_digest) if new.scores_digest and _has_scores(new.scores_digest) else None
    if scores is not None and scores.model.digest != old.model.digest:
        scores = None
    try:
        return comparison_document(compare(old, new, scores))
    except ContractError as error:
        raise InputError(str(error)) from None


def _allocation(
    identity: str, request: AllocationRequest, name: str, scores: Scores, manifest: Manifest, plan: Plan | None
) -> Allocation:
    assert manifest.proof is not None
    return Allocation(
        id=identity,
        model=name,
        model_digest=manifest.model.digest,
        scores_digest=scores.digest,
        bank_digest=manifest.bank_digest,
        manifest_digest=manifest.digest,
        request=request,
        requested=manifest.budget.requested,
        budget_bytes=manifest.budget.nbytes,
        tensor_bytes=manifest.tensor_bytes,
        average_bits=average_bits(manifest.modules, _choosable(scores)),
        predicted_loss=manifest.proof.objective,
        unit=scores.unit,
        proof=manifest.proof,
        weight_budget_bytes=None if plan is None else plan.weight_budget_bytes,
    )


def _measured(scores: Scores, digests: list[str]) -> list[MeasuredPoint]:
    manifests = filter(None, map(_opened().manifest, digests))
    found = sorted(filter(None, (recorded_loss(m, scores) for m in manifests)), key=lambda r: r.tensor_bytes)
    return [MeasuredPoint.model_validate(recorded_row(one)) for one in found]


def _uniform(plan: UniformPlan) -> SweepPoint:
    size, loss = plan.tensor_bytes, plan.objective
    return SweepPoint(
        budget_bytes=size, tensor_bytes=size, average_bits=plan.average_bits, predicted_loss=loss, bound=loss
    )


def _choosable(scores: Scores) -> set[str]:
    return {name for name, module in scores.modules.items() if len(module.candidates) > 1}


def _manifest_of(given: bytes | dict[str, Any], where: str) -> Manifest:
    try:
        return Manifest.parse(json.loads(given) if isinstance(given, bytes) else given, where)
    except ContractError as error:
        raise InputError(str(error)) from None


def _has_scores(digest: str) -> bool:
    return digest in _scores or _opened().backend.exists(f"scores/{digest[7:]}.json")


def _scores_of(digest: str) -> Scores:
    scores = _scores.get(digest)
    if scores is None:
        scores = _opened().scores(digest)
        if scores is None:
            raise ContractError(f"the store has lost the scores {digest}; add them again with `gamma store add`")
        _scores[digest] = scores
    _scores.move_to_end(digest)
    while len(_scores) > _KEPT_SCORES:
        _scores.popitem(last=False)
    return scores


def _opened() -> Store:
    assert _store is not None
    return _store


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
