"""The KV cache of vLLM as arithmetic: blocks, sequences, tokens.

Mirrors `v1/core/kv_cache_utils.py` (`get_kv_cache_configs`, `_pool_bytes_per_block`) of vLLM 0.32 and 0.33. All groups
of layers (`kv_groups`) take their blocks from one pool, so a block has the bytes of the largest group. One block, the
null block, is never used.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from allocator.contract.errors import InputError
from allocator.model.shape import AttentionLayer, ModelShape
from allocator.plan.kv_groups import LayerGroup, layer_groups
from allocator.plan.schema import PlanRequest

__all__ = ["KvCapacity", "KvPool", "kv_pools", "pools_of", "stage_layers"]


@dataclass(frozen=True)
class KvCapacity:
    """What a pool of some bytes holds: `num_blocks` with the null block, as vLLM logs them; whole tokens."""

    num_blocks: int
    tokens: int
    concurrency: float


@dataclass(frozen=True)
class KvPool:
    """The KV cache of one rank. `in_flight_tokens` can be scheduled before the window moves on."""

    groups: tuple[LayerGroup, ...]
    in_flight_tokens: int

    @property
    def bytes_per_block(self) -> int:
        return max(group.nbytes for group in self.groups)

    @property
    def has_states(self) -> bool:
        """Whether layers keep a state of each sequence."""
        return any(group.states for group in self.groups)

    def blocks_per_sequence(self, length: int) -> int:
        """Blocks that one sequence of `length` tokens needs, over all groups."""
        return sum(group.blocks(length, self.in_flight_tokens) for group in self.groups)

    def bytes_for(self, sequences: int, length: int) -> int:
        """Bytes of a pool that holds `sequences` of `length` tokens at once, the null block included."""
        return self.bytes_per_block * (sequences * self.blocks_per_sequence(length) + 1)

    def state_bytes(self, sequences: int) -> int:
        """The part of `bytes_for` that holds states, which do not grow with the length."""
        blocks = sum(group.states for group in self.groups)
        return self.bytes_per_block * sequences * blocks

    def capacity(self, available_bytes: int, length: int) -> KvCapacity:
        """What vLLM makes of `available_bytes` for sequences of `length` (`get_kv_cache_capacity`)."""
        num_blocks = max(available_bytes, 0) // self.bytes_per_block
        concurrency = num_blocks / self.blocks_per_sequence(length)
        return KvCapacity(num_blocks, int(concurrency * length), concurrency)

    def sequences(self, available_bytes: int, length: int) -> int:
        """Whole sequences of `length` tokens that fit at once."""
        num_blocks = max(available_bytes, 0) // self.bytes_per_block
        return max(num_blocks - 1, 0) // self.blocks_per_sequence(length)

    def longest(self, available_bytes: int, sequences: int, at_most: int) -> int:
        """The longest sequences of which `sequences` fit at once, at most `at_most` tokens; 0 if none fits."""
        low, high = 0, at_most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.bytes_for(sequences, middle) <= available_bytes else (low, middle - 1)
        return low


def kv_pools(shape: ModelShape, request: PlanRequest, batched_tokens: int) -> list[KvPool]:
    """The pool of a rank of each pipeline stage. Raises InputError for a model whose cache is not known."""
    try:
        return pools_of(shape.attention, request, batched_tokens)
    except InputError as error:
        raise InputError(
            f"{shape.architecture}: {error}; learn, and solve for a budget in bytes or bits (--budget, --average-bits)"
        ) from error


def pools_of(attention: Sequence[AttentionLayer], request: PlanRequest, batched_tokens: int) -> list[KvPool]:
    """Likewise, by the layers of a model. Raises InputError."""
    groups = layer_groups(attention, request.ranks, request.kv_element_bytes, request.block_size)
    # One batch runs on each stage and, with asynchronous scheduling, one more is prepared.
    in_flight = (request.pipeline_parallel_size + 1) * batched_tokens
    stages = stage_layers(len(attention), request.pipeline_parallel_size)
    pools = [KvPool(tuple(group.within(stage) for group in groups), in_flight) for stage in stages]
    if not all(any(group.nbytes for group in pool.groups) for pool in pools):
        raise InputError("a pipeline stage of blocks that keep nothing is not planned")
    return pools


def stage_layers(blocks: int, stages: int) -> list[range]:
    """The blocks of each pipeline stage (`get_pp_indices`): what is left over goes to the stages before the last."""
    counts = [blocks // stages] * stages
    for i in range(2, blocks % stages + 2):
        counts[-i] += 1
    ranges, start = [], 0
    for count in counts:
        ranges.append(range(start, start + count))
        start += count
    return ranges
