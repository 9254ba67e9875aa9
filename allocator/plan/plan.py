"""The plan: where a GPU's memory goes line by line, what is left for the weights, and what would make it enough."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from allocator.contract.errors import InputError
from allocator.contract.layout import GROUP_SIZES, WIDTHS, ModuleFormat
from allocator.model.shape import ModelShape
from allocator.plan import overheads
from allocator.plan.gpus import Device, Gpu, find_gpu, load_catalogue
from allocator.plan.kv_cache import KvPool, kv_pools
from allocator.plan.lora import check_lora, lora_activation_bytes, lora_bytes
from allocator.plan.schema import (
    Advice,
    Basis,
    Capacity,
    DeviceMemory,
    Line,
    Plan,
    PlanRequest,
    UniformWidth,
    Verdict,
    check_request,
    default_batched_tokens,
)
from allocator.plan.weights import check_formats, residency_of, weight_sizes

__all__ = [
    "PROBED",
    "Ledger",
    "Plan",
    "PlannedWeights",
    "advise",
    "batched_tokens",
    "ledger",
    "make_plan",
    "plans_of_catalogue",
]

PROBED = (
    "LoRA adapters",
    "activations",
    "cuda graphs",
    "non-torch",
    "attention workspace",
    "position tables",
    "slack",
)
"""Lines that a probe on the real device can replace."""
STATES = "recurrent state"
"""The line of what linear attention and Mamba keep of each sequence, beside keys and values."""


@dataclass(frozen=True)
class Ledger:
    """The lines, the KV pools of the pipeline stages, and `budget`, the bytes left for the weights of a rank. `request`
    is what was asked for, with no more sequences at once than vLLM starts with."""

    request: PlanRequest
    lines: list[Line]
    pools: list[KvPool]
    kv_bytes: int
    budget: int


def batched_tokens(request: PlanRequest, device: Device) -> int:
    """Tokens of one batch: as asked for, or what `vllm serve` takes on the device."""
    return request.max_num_batched_tokens or default_batched_tokens(device.cuda_bytes, device.name)


def ledger(shape: ModelShape, device: Device, request: PlanRequest, probe: Mapping[str, int]) -> Ledger:
    """All lines of a checked request; `probe` replaces those of `PROBED` by measured bytes."""
    tokens = batched_tokens(request, device)
    pools = kv_pools(shape, request, tokens)
    request = _startable(request, pools)
    length = request.max_model_len
    assert length is not None
    # vLLM takes the ceiling of the product (`request_memory`); utilizations have at most six digits here.
    allowed = -(-device.cuda_bytes * round(request.gpu_memory_utilization * 10**6) // 10**6)
    kv, states = max(
        (pool.bytes_for(request.cached_sequences, length), pool.state_bytes(request.cached_sequences)) for pool in pools
    )
    lines = [
        _line("device memory", device.total_bytes, "exact", "as the driver reports"),
        _line("CUDA memory", device.cuda_bytes, device.basis, "what vLLM sees"),
        _line("vLLM may use", allowed, device.basis, f"utilization {request.gpu_memory_utilization:g}"),
        _line("KV cache", kv - states, "exact", f"{request.cached_sequences} x {length} tokens"),
        *([_line(STATES, states, "exact", _states_note(shape, request, pools))] if states else []),
        *_adapters(shape, request, probe),
        *_overheads(shape, device, request, tokens, probe),
    ]
    budget = allowed - sum(line.nbytes for line in lines[3:])
    lines.append(_line("left for weights", budget, "formula", "a rank, after loading"))
    return Ledger(request, lines, pools, kv, budget)


def _startable(request: PlanRequest, pools: list[KvPool]) -> PlanRequest:
    """Where layers keep a state, vLLM captures its graphs only if the pool has a block for each of `max_num_seqs`
    (`CompilationConfig.resolve_cudagraph_mode_and_sizes`): no more than the planned sequences leave."""
    if request.kv_sequences is None or request.enforce_eager or not any(pool.has_states for pool in pools):
        return request
    assert request.max_model_len is not None
    blocks = min(request.kv_sequences * pool.blocks_per_sequence(request.max_model_len) + 1 for pool in pools)
    return request.model_copy(update={"max_num_seqs": min(request.max_num_seqs, blocks)})


def _states_note(shape: ModelShape, request: PlanRequest, pools: list[KvPool]) -> str:
    """Of how many layers, how often vLLM keeps it, and how much of a page is padding."""
    states = [layer.state for layer in shape.attention if layer.state is not None]
    kept = sum(state.nbytes(request.tensor_parallel_size) for state in states)
    pages = sum(sum(group.pages.values()) for pool in pools for group in pool.groups if group.states)
    return f"{request.cached_sequences} x {states[0].copies} of {len(states)} layers, {1 - kept / pages:.0%} padding"


def _adapters(shape: ModelShape, request: PlanRequest, probe: Mapping[str, int]) -> list[Line]:
    if request.lora is None:
        return []
    name, note = "LoRA adapters", f"{request.lora.max_loras} of rank {request.lora.max_lora_rank}"
    if name in probe:
        return [_line(name, probe[name], "probe", note)]
    return [_line(name, lora_bytes(shape, request), "exact", note)]


def _overheads(
    shape: ModelShape, device: Device, request: PlanRequest, tokens: int, probe: Mapping[str, int]
) -> list[Line]:
    blackwell = device.capability is not None and device.capability[0] == 10
    activations = overheads.activation_bytes(shape, request, tokens) + lora_activation_bytes(request, tokens)
    predicted: dict[str, tuple[int, Basis, str]] = {
        "activations": (activations, "formula", f"{tokens} tokens at once"),
        "cuda graphs": (overheads.cuda_graph_bytes(shape, request, tokens, blackwell), "measured", ""),
        "non-torch": (overheads.non_torch_bytes(request), "measured", ""),
        "attention workspace": (overheads.attention_workspace_bytes(request, device.capability), "formula", ""),
        "position tables": (shape.position_bytes, "exact", ""),
        "slack": (overheads.slack_bytes(shape), "formula", "of the allocator"),
    }
    return [
        _line(name, probe[name], "probe", note) if name in probe else _line(name, nbytes, basis, note)
        for name, (nbytes, basis, note) in predicted.items()
    ]


def _line(name: str, nbytes: int, basis: Basis, note: str = "") -> Line:
    return Line(name=name, nbytes=nbytes, basis=basis, note=note)


_LENGTH_STEP = 256


def advise(
    shape: ModelShape,
    device: Device,
    request: PlanRequest,
    needed: int,
    probe: Mapping[str, int],
) -> list[Advice]:
    """Each change that alone gives the weights their `needed` bytes; the least change first within an option."""

    def fits(**changes: object) -> bool:
        changed = request.model_copy(update=changes)
        try:
            checked = check_request(changed, shape, device.capability, device.cuda_bytes)
        except InputError:
            return False
        return ledger(shape, device, checked, probe).budget >= needed

    assert request.max_model_len is not None
    advice = []
    length = _largest(request.max_model_len // _LENGTH_STEP, lambda n: fits(max_model_len=n * _LENGTH_STEP))
    if length:
        value = length * _LENGTH_STEP
        advice.append(_advice("--max-model-len", value, f"sequences of at most {value} tokens"))
    sequences = _largest(request.max_num_seqs - 1, lambda n: fits(max_num_seqs=n))
    if sequences:
        advice.append(_advice("--max-num-seqs", sequences, f"at most {sequences} sequences at once"))
    if request.kv_element_bytes == 2 and fits(kv_cache_dtype="fp8"):
        advice.append(_advice("--kv-cache-dtype", "fp8", "keys and values in 8 bits"))
    if request.gpu_memory_utilization < 0.95 and fits(gpu_memory_utilization=0.95):
        advice.append(_advice("--gpu-memory-utilization", "0.95", "less left free for others on the device"))
    return advice or _larger_card(shape, device, request, needed)


def _larger_card(shape: ModelShape, device: Device, request: PlanRequest, needed: int) -> list[Advice]:
    """The card of least memory above `device` that does, where no option alone is enough."""
    cards = [gpu for gpu in load_catalogue() if gpu.why_not is None and gpu.memory_bytes > device.total_bytes]
    for gpu in sorted(cards, key=lambda g: g.memory_bytes):
        larger = find_gpu(gpu.name)
        try:
            check_request(request, shape, larger.capability, larger.cuda_bytes)
        except InputError:
            continue
        if ledger(shape, larger, request, {}).budget >= needed:
            name = (gpu.aliases or [gpu.name])[0]
            return [_advice("--gpu", name, f"{gpu.name} has {gpu.memory_bytes / 2**30:.0f} GiB")]
    return []


def _advice(option: str, value: object, message: str) -> Advice:
    return Advice(option=option, value=str(value), message=message)


def _largest(at_most: int, fits: Callable[[int], bool]) -> int:
    """The largest n in 1..at_most that fits, 0 if none; what fits fits also for less."""
    low, high = 0, at_most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@dataclass(frozen=True)
class PlannedWeights:
    """`group_size` and `symmetric` are those of the candidates. `formats` are the modules of a checkpoint: then the
    plan says what its weights leave for the KV cache."""

    group_size: int = 128
    symmetric: bool = False
    formats: Mapping[str, ModuleFormat] | None = None


def make_plan(
    shape: ModelShape,
    device: Device,
    request: PlanRequest,
    *,
    model: str = "",
    weights: PlannedWeights = PlannedWeights(),
    probe: Mapping[str, int] | None = None,
) -> Plan:
    """Plan `shape` on `device` for `request`.

    `probe` replaces lines (`PROBED`) by bytes measured on the device. Raises InputError for a request that vLLM would
    refuse.
    """
    if weights.group_size not in GROUP_SIZES:
        raise InputError(f"group size {weights.group_size} does not exist; allowed are {list(GROUP_SIZES)}")
    probe = dict(probe or {})
    if not probe.keys() <= set(PROBED):
        raise InputError(f"probed lines {sorted(probe.keys() - set(PROBED))} are not known; known are {PROBED}")
    request = check_request(request, shape, device.capability, device.cuda_bytes)
    if request.lora is not None:
        check_lora(shape, request.lora)
    total = ledger(shape, device, request, probe)
    request = total.request
    residency = residency_of(shape, request)
    sizes = weight_sizes(shape, residency, weights.group_size, weights.symmetric)
    fixed = None
    if weights.formats is not None:
        check_formats(shape, weights.formats)
        fixed = max(residency.stage_bytes(weights.formats))
    uniform = {bits: sizes.uniform_bytes(bits) for bits in WIDTHS}
    needed = sizes.smallest_bytes if fixed is None else fixed
    missing = max(needed - total.budget, 0)
    average = sizes.average_bits(total.budget) if not missing and fixed is None else None
    advice = advise(shape, device, request, needed, probe) if missing else []
    filled = fixed if fixed is not None else min(total.budget, uniform[16])
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
        planned=_capacity(total, request, filled) if fixed is not None or not missing else None,
        verdict=_verdict(missing, average, advice),
        advice=advice,
    )


def plans_of_catalogue(
    shape: ModelShape,
    catalogue: Sequence[Gpu],
    request: PlanRequest,
    *,
    model: str = "",
    weights: PlannedWeights = PlannedWeights(),
) -> list[Plan]:
    """A plan for every card of `catalogue` that runs the kernels and what `request` asks, least memory first."""
    cards = [find_gpu(gpu.name, catalogue) for gpu in catalogue if gpu.why_not is None]
    check_request(request, shape, None)
    if request.lora is not None:
        check_lora(shape, request.lora)
    plans = []
    for device in sorted(cards, key=lambda d: (d.cuda_bytes, d.name)):
        try:
            plans.append(make_plan(shape, device, request, model=model, weights=weights))
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
