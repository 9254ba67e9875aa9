"""What would make a plan fit: for each option alone, the value nearest to what was asked for."""

from collections.abc import Callable, Mapping

from allocator.contract.errors import InputError
from allocator.fitting.catalogue import Device, find_gpu, load_catalogue
from allocator.fitting.document import Advice
from allocator.fitting.lines import ledger
from allocator.fitting.request import PlanRequest, check_request
from allocator.inventory.shape import ModelShape

__all__ = ["advise"]

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
