"""The KV cache of vLLM as arithmetic: pages, groups of layers, blocks, sequences.

Mirrors `v1/core/kv_cache_utils.py` (`get_kv_cache_groups`, `get_kv_cache_configs`, `_pool_bytes_per_block`) and
`v1/kv_cache_interface.py` (`FullAttentionSpec`, `SlidingWindowSpec`, `MLAAttentionSpec`) of vLLM 0.32 and 0.33. A page
is one layer's part of one block of `block_size` tokens. Layers of one kind form groups of equal size; all
groups take their blocks from one pool, so a block has the bytes of the largest group. One block, the null
block, is never used.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from allocator.contract.errors import InputError
from allocator.contract.resident import Ranks
from allocator.model.shape import AttentionLayer, ModelShape
from allocator.plan.schema import PlanRequest

__all__ = ["KvCapacity", "KvGroup", "KvPool", "kv_pools", "stage_layers"]


@dataclass(frozen=True)
class KvGroup:
    """Layers of one kind that share a block table; `layers` is how many of them a rank's stage has."""

    layers: int
    window: int | None


@dataclass(frozen=True)
class KvCapacity:
    """What a pool of some bytes holds: `num_blocks` with the null block, as vLLM logs them; whole tokens."""

    num_blocks: int
    tokens: int
    concurrency: float


@dataclass(frozen=True)
class KvPool:
    """The KV cache of one rank. `in_flight_tokens` can be scheduled before the window moves on."""

    groups: tuple[KvGroup, ...]
    block_size: int
    page_bytes: int
    in_flight_tokens: int

    @property
    def bytes_per_block(self) -> int:
        return self.page_bytes * max(group.layers for group in self.groups)

    def blocks_per_sequence(self, length: int) -> int:
        """Blocks that one sequence of `length` tokens needs, over all groups."""
        return sum(_group_blocks(group, length, self.block_size, self.in_flight_tokens) for group in self.groups)

    def bytes_for(self, sequences: int, length: int) -> int:
        """Bytes of a pool that holds `sequences` of `length` tokens at once, the null block included."""
        return self.bytes_per_block * (sequences * self.blocks_per_sequence(length) + 1)

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
    """The pool of a rank of each pipeline stage."""
    if any(layer.kind == "other" for layer in shape.attention):
        raise InputError(
            f"{shape.architecture}: layers that are neither full nor sliding-window attention keep a state, whose "
            "memory is not planned yet; learn, and solve for a budget in bytes or bits (--budget, --average-bits)"
        )
    sizes = {(layer.kind == "mla", layer.kv_heads, layer.key_size + layer.value_size) for layer in shape.attention}
    if len(sizes) != 1:
        raise InputError(f"{shape.architecture}: layers with KV caches of different sizes are not planned yet")
    is_mla, heads, numbers = sizes.pop()
    on_rank = 1 if is_mla else _heads_on_rank(heads, request.ranks)
    page = request.block_size * on_rank * numbers * request.kv_element_bytes
    groups = _groups(shape.attention)
    # One batch runs on each stage and, with asynchronous scheduling, one more is prepared.
    in_flight = (request.pipeline_parallel_size + 1) * batched_tokens
    pools = []
    for stage in stage_layers(shape.blocks, request.pipeline_parallel_size):
        here = tuple(KvGroup(len(set(stage) & layers), window) for layers, window in groups)
        pools.append(KvPool(here, request.block_size, page, in_flight))
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


def _groups(attention: Iterable[AttentionLayer]) -> list[tuple[set[int], int | None]]:
    """Layers of each group and their window (`_get_kv_cache_groups_uniform_page_size`)."""
    kinds: dict[int | None, list[int]] = {}
    for index, layer in enumerate(attention):
        kinds.setdefault(layer.window, []).append(index)
    least, most = min(map(len, kinds.values())), max(map(len, kinds.values()))
    size = most if most < 1.5 * least else least
    groups = []
    for window, layers in kinds.items():
        count = -(-len(layers) // size)
        groups += [(set(layers[i::count]), window) for i in range(count)]
    return groups


def _group_blocks(group: KvGroup, length: int, block_size: int, in_flight: int) -> int:
    if group.window is None:
        return -(-length // block_size)
    kept = min(group.window - 1 + in_flight, length)
    return -(-kept // block_size) + 1  # the window need not begin where a block does


def _heads_on_rank(heads: int, ranks: Ranks) -> int:
    return max(heads // ranks.tensor_parallel_size, 1)
