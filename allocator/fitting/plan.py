"""The plan: what is left for the weights, whether that is enough, and what would make it so."""

from collections.abc import Mapping, Sequence

from allocator.contract.errors import InputError
from allocator.contract.layout import GROUP_SIZES, WIDTHS, ModuleFormat
from allocator.fitting.advice import advise
from allocator.fitting.catalogue import Device, Gpu, find_gpu
from allocator.fitting.document import Advice, Capacity, DeviceMemory, Plan, UniformWidth, Verdict
from allocator.fitting.lines import PROBED, Ledger, batched_tokens, ledger
from allocator.fitting.lora import check_lora
from allocator.fitting.request import PlanRequest, check_request
from allocator.fitting.weights import check_formats, residency_of, weight_sizes
from allocator.inventory.shape import ModelShape

__all__ = ["Plan", "make_plan", "plans_of_catalogue"]


def make_plan(
    shape: ModelShape,
    device: Device,
    request: PlanRequest,
    *,
    model: str = "",
    group_size: int = 128,
    symmetric: bool = False,
    formats: Mapping[str, ModuleFormat] | None = None,
    probe: Mapping[str, int] | None = None,
) -> Plan:
    """Plan `shape` on `device` for `request`.

    `group_size` and `symmetric` are those of the candidates. `formats` are the modules of a checkpoint: then
    the plan says what its weights leave for the KV cache. `probe` replaces lines (`PROBED`) by bytes measured
    on the device. Raises InputError for a request that vLLM would refuse.
    """
    if group_size not in GROUP_SIZES:
        raise InputError(f"group size {group_size} does not exist; allowed are {list(GROUP_SIZES)}")
    probe = dict(probe or {})
    if not probe.keys() <= set(PROBED):
        raise InputError(f"probed lines {sorted(probe.keys() - set(PROBED))} are not known; known are {PROBED}")
    request = check_request(request, shape, device.capability, device.cuda_bytes)
    if request.lora is not None:
        check_lora(shape, request.lora)
    residency = residency_of(shape, request)
    sizes = weight_sizes(shape, residency, group_size, symmetric)
    total = ledger(shape, device, request, probe)
    fixed = None
    if formats is not None:
        check_formats(shape, formats)
        fixed = max(residency.stage_bytes(formats))
    uniform = {bits: sizes.uniform_bytes(bits) for bits in WIDTHS}
    needed = sizes.smallest_bytes if fixed is None else fixed
    missing = max(needed - total.budget, 0)
    average = sizes.average_bits(total.budget) if not missing and fixed is None else None
    advice = advise(shape, device, request, needed, probe) if missing else []
    weights = fixed if fixed is not None else min(total.budget, uniform[16])
    return Plan(
        model=model,
        architecture=shape.architecture,
        parameters=shape.parameters,
        device=_device_memory(device),
        request=request,
        batched_tokens=batched_tokens(request, device),
        lines=total.lines,
        kv_bytes_per_block=max(pool.bytes_per_block for pool in total.pools),
        kv_blocks_per_sequence=total.pools[0].blocks_per_sequence(request.max_model_len or 1),
        residency=residency,
        weight_budget_bytes=total.budget,
        smallest_weight_bytes=sizes.smallest_bytes,
        uniform=[UniformWidth(num_bits=b, nbytes=n, fits=n <= total.budget) for b, n in uniform.items()],
        planned=_capacity(total, request, weights) if fixed is not None or not missing else None,
        verdict=_verdict(missing, average, advice),
        advice=advice,
    )


def plans_of_catalogue(
    shape: ModelShape,
    catalogue: Sequence[Gpu],
    request: PlanRequest,
    *,
    model: str = "",
    group_size: int = 128,
    symmetric: bool = False,
    formats: Mapping[str, ModuleFormat] | None = None,
) -> list[Plan]:
    """A plan for every card of `catalogue` that runs the kernels and what `request` asks, least memory first."""
    cards = [find_gpu(gpu.name, catalogue) for gpu in catalogue if gpu.why_not is None]
    check_request(request, shape, None)
    if request.lora is not None:
        check_lora(shape, request.lora)
    plans = []
    for device in sorted(cards, key=lambda d: (d.cuda_bytes, d.name)):
        try:
            plans.append(
                make_plan(
                    shape, device, request, model=model, group_size=group_size, symmetric=symmetric, formats=formats
                )
            )
        except InputError:
            continue  # the card has no kernels for the KV cache that was asked for
    return plans


def _capacity(total: Ledger, request: PlanRequest, weights: int) -> Capacity | None:
    """What the tightest stage's KV cache holds when the weights take `weights` bytes."""
    left = total.kv_bytes + total.budget - weights
    if left <= 0:
        return None
    assert request.max_model_len is not None
    pool = max(total.pools, key=lambda p: p.bytes_per_block)
    capacity = pool.capacity(left, request.max_model_len)
    return Capacity(
        weight_bytes=weights,
        kv_bytes=left,
        num_blocks=capacity.num_blocks,
        tokens=capacity.tokens,
        sequences=pool.sequences(left, request.max_model_len),
    )


def _device_memory(device: Device) -> DeviceMemory:
    capability = device.capability
    return DeviceMemory(
        name=device.name,
        total_bytes=device.total_bytes,
        cuda_bytes=device.cuda_bytes,
        basis=device.basis,
        compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        product_label=device.product_label,
        resource=device.resource,
    )


def _verdict(missing: int, average: float | None, advice: list[Advice]) -> Verdict:
    if not missing:
        what = "fits" if average is None else f"fits at {average:.2f} average bits"
        return Verdict(fits=True, message=what, needs_bytes=0, average_bits=average)
    options = "; ".join(f"{a.option} {a.value} fits" for a in advice) or "no single option makes it fit"
    return Verdict(fits=False, message=f"needs {missing / 2**30:.2f} GiB more: {options}", needs_bytes=missing)
