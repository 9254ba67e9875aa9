"""Experts on NVIDIA GPUs in humming's indexed products: one launch for all experts of a width, not one for each.

As vLLM's own experts use it (`HummingIndexedExperts`): tokens are put into blocks by expert on the GPU, a launch finds
the expert of each block, and nothing waits for the CPU, so that a captured graph multiplies only experts that got
tokens. A launch sees only the experts of its width; those of others are left out of its blocks.

Not run on a GPU yet, and therefore off unless `GAMMA_HUMMING_EXPERTS=together`.
"""

import functools
import json
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from allocator.contract.resident import HUMMING_COLUMNS, HUMMING_ROWS
from gamma_vllm.kernels.base import Place, Stack
from gamma_vllm.shards import Segment

__all__ = ["Launch", "kernels_of_experts", "launch_indexed", "launches_of", "multiply_experts", "wanted"]

_VARIABLE = "GAMMA_HUMMING_EXPERTS"
_TUNED_PAIRS = (8, 64, 256, 1024, 4096, 16384)
"""Numbers of (token, choice) pairs for which humming's choice of kernel is taken, each up to the next."""
_ANY_PAIRS = 1 << 30


def wanted() -> bool:
    """Whether experts of a width are multiplied together. Raises ValueError on an unknown `GAMMA_HUMMING_EXPERTS`."""
    value = os.environ.get(_VARIABLE, "alone")
    if value not in ("alone", "together"):
        raise ValueError(f"{_VARIABLE}={value!r}: expected alone or together")
    return value == "together"


@dataclass(frozen=True)
class Launch:
    """The segments of one kind at one place in their experts' rows.

    start: the first of those rows. number: int32 `[experts + 1]`: that of expert i - 1 among these, or -1 where it has
    none; its first entry is that of tokens of other ranks, whose id is -1. places: by name, those of all of them.
    """

    start: int
    segment: Segment
    number: Tensor
    places: dict[str, Place]


def launches_of(stack: Stack, device: torch.device) -> list[Launch] | None:
    """What multiplies a stack; None where a part is at 16 bits, or experts of a kind do not lie next to each other."""
    members: dict[tuple[int, ...], list[tuple[int, int, Segment]]] = {}
    for expert, segments in enumerate(stack.segments):
        begin = 0
        for number, segment in enumerate(segments):
            if not segment.quantized or (not segment.symmetric and segment.rows % 32):
                return None
            kind = (begin, segment.rows, segment.num_bits, segment.group_size or 0, bool(segment.symmetric))
            members.setdefault(kind, []).append((expert, number, segment))
            begin += segment.rows
    launches = []
    for (start, *_), found in members.items():
        first_expert, first_number, segment = found[0]
        places = {}
        for name in ("packed", "scale") if segment.symmetric else ("packed", "scale", "zero_point"):
            first = stack.places[first_expert, first_number, name]
            size = math.prod(first.shape)
            for i, (expert, number, _segment) in enumerate(found):
                if stack.places[expert, number, name].offset != first.offset + i * size:
                    return None
            places[name] = Place(first.offset, (len(found), *first.shape))
        places["locks"] = stack.places[first_expert, first_number, "locks"]
        numbers = torch.full((len(stack.segments) + 1,), -1, dtype=torch.int32)
        numbers[[expert + 1 for expert, _number, _segment in found]] = torch.arange(len(found), dtype=torch.int32)
        launches.append(Launch(start, segment, numbers.to(device), places))
    return launches


def multiply_experts(stack: Stack, launches: list[Launch], x: Tensor, ids: Tensor, choices: int) -> Tensor:
    """`x` times the weights of each pair's expert: `[pairs, rows of the stack]`, zeros for experts of other ranks.

    x: `[pairs / choices, columns]`, a row for each token (`choices` of each) or each pair (1). ids: `[tokens, choices]`
    numbers of local experts, or -1.
    """
    pairs, total = ids.numel(), sum(segment.rows for segment in stack.segments[0])
    shifted = (ids + 1).to(torch.int32)
    output = x.new_zeros(pairs, total)
    places = {(0, total): output}
    for launch in launches:
        rows = launch.segment.rows
        if (launch.start, rows) not in places:
            places[launch.start, rows] = x.new_zeros(pairs, rows)
        _launch(stack, launch, x, shifted, choices, places[launch.start, rows])
    for (start, rows), place in places.items():
        if place is not output:
            output.narrow(1, start, rows).add_(place)  # zeros where this expert's rows are joined otherwise
    return output


def _launch(stack: Stack, launch: Launch, x: Tensor, ids: Tensor, choices: int, output: Tensor) -> None:
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    segment, experts = launch.segment, launch.number.numel() - 1
    kind = (segment.rows, segment.columns, segment.group_size or 0, segment.num_bits, not segment.symmetric)
    kernels, blocks = kernels_of_experts(*kind, experts, x.dtype, x.device)
    block = next(size for most, size in blocks if ids.numel() <= most)
    routed = moe_align_block_size(ids, block, experts + 1, launch.number, ignore_invalid_experts=True)
    held = {
        name: stack.tensors[name].narrow(0, place.offset, math.prod(place.shape)).view(place.shape)
        for name, place in launch.places.items()
    }
    launch_indexed(kernels, x, held, routed, choices, output)


def launch_indexed(
    kernels: Tensor, x: Tensor, held: dict[str, Tensor], routed: tuple[Tensor, ...], choices: int, output: Tensor
) -> None:
    """One launch: row `i` of `output` is row `i // choices` of `x` times the weight of its block's expert, for each `i`
    in a block. routed: as `moe_align_block_size` gives it; held: tensors of all experts of the launch.

    humming's own checks would want as many experts as its kernel was compiled for. That is the number of all, whatever
    their width, or there would be a kernel to compile for each number of experts that a width has in some layer.
    """
    from humming.ops.utils import init_humming_launcher

    init_humming_launcher()
    sorted_ids, expert_ids, padded = routed
    torch.ops.humming.launch_kernel.out(
        kernels, x, held["packed"], held["scale"], None, None, None, held.get("zero_point"), None, output, sorted_ids,
        expert_ids, padded, None, held["locks"], choices, output.shape[0], False,
    )  # fmt: skip


@functools.cache
def kernels_of_experts(
    rows: int,
    columns: int,
    group_size: int,
    num_bits: int,
    asymmetric: bool,
    experts: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, list[tuple[int, int]]]:
    """What humming launches, and for each number of pairs (up to so many) the tokens in a block."""
    from humming.kernel.humming import HummingKernel as Library
    from humming.transform import prepare_layer_config
    from humming.tune import get_heuristics_config

    from gamma_vllm.kernels.humming import compute_config, schemas_of

    schema, inputs = schemas_of(num_bits, group_size, asymmetric)
    config = prepare_layer_config(
        shape_n=rows,
        shape_k=columns,
        weight_schema=schema,
        input_schema=inputs,
        num_experts=experts,
        pad_n_to_multiple=HUMMING_ROWS,
        pad_k_to_multiple=HUMMING_COLUMNS,
        has_bias=False,
        torch_dtype=dtype,
        device=device,
    )
    settings = compute_config("indexed")
    intervals: list[list[Any]] = []
    low = 0
    for pairs in _TUNED_PAIRS:
        high = pairs if pairs != _TUNED_PAIRS[-1] else _ANY_PAIRS
        chosen = get_heuristics_config(config, shape_m=pairs, device=device, **json.loads(settings))
        intervals.append([low, high, chosen])
        low = high
    kernels = Library.prepare_kernels(config.to_str(), settings, json.dumps(intervals), device)
    return kernels, [(high, chosen["block_shape"][0]) for _low, high, chosen in intervals]
