"""How vLLM divides the layers' caches into groups that share a pool of blocks, and what a block then holds.

Mirrors `v1/core/kv_cache_utils.py` (`get_kv_cache_groups`), `v1/kv_cache_interface.py` and, for layers that keep a
state, `Platform._align_hybrid_block_size` of vLLM 0.32, with prefix caching (its default) and a layout whose outermost
dimension is the layer (that of FlashAttention, FlashInfer and Triton). A page is one layer's part of one block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from allocator.contract.errors import InputError
from allocator.contract.resident import Ranks
from allocator.model.shape import AttentionLayer

__all__ = ["LayerGroup", "layer_groups"]


@dataclass(frozen=True)
class _Pages:
    """What one layer keeps on a rank, `form` whatever else must be equal in a group. `page_bytes` are of a block of
    `block_size` tokens, or of a state."""

    kind: Literal["full", "mla", "sliding", "chunked", "state"]
    form: tuple[int, ...]
    block_size: int
    page_bytes: int
    window: int | None = None
    states: int = 0


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share a block table: their numbers and the bytes of the page of each, by layer.

    `window` is that of a sliding window, of `chunked` ones their size; with `states` a page holds a state, of which a
    sequence has so many, instead of `block_size` tokens.
    """

    pages: dict[int, int]
    block_size: int
    window: int | None
    chunked: bool
    states: int

    @property
    def nbytes(self) -> int:
        """Of one block."""
        return sum(self.pages.values())

    def within(self, layers: Sequence[int]) -> "LayerGroup":
        """What of the group a pipeline stage with `layers` has."""
        return replace(self, pages={i: nbytes for i, nbytes in self.pages.items() if i in layers})

    def blocks(self, length: int, in_flight: int) -> int:
        """Blocks that a sequence of `length` tokens takes, of which `in_flight` may be scheduled at once."""
        if self.states:
            return self.states
        if self.window is None:
            return -(-length // self.block_size)
        if self.chunked:
            return -(-min(self.window + in_flight, length) // self.block_size)
        kept = min(self.window - 1 + in_flight, length)
        return -(-kept // self.block_size) + 1  # the window need not begin where a block does


def layer_groups(
    attention: Sequence[AttentionLayer], ranks: Ranks, element_bytes: int, block_size: int
) -> list[LayerGroup]:
    """The groups of all layers that keep something, on one rank.

    `element_bytes` are those of a key's numbers, `block_size` what was asked for: layers that keep a state make vLLM
    raise it until a page of keys and values is no smaller than a state. Raises InputError for layers of unknown kinds.
    """
    if any(layer.kind == "other" for layer in attention):
        raise InputError(
            "the caches of some of its layers are not planned yet (known are full, latent, windowed and linear "
            "attention, Mamba 2 and short convolutions; not the index of sparse attention, nor two kinds in one layer)"
        )
    size = ranks.tensor_parallel_size
    states = [layer.state.nbytes(size) for layer in attention if layer.state is not None]
    tokens = {i: _token_bytes(layer, size, element_bytes) for i, layer in enumerate(attention) if _caches(layer)}
    state_page = 0
    if states and tokens:
        token_bytes = min(tokens.values())
        step = max(block_size, 128 if any(layer.kind == "mla" for layer in attention) else _KERNEL_BLOCK)
        least = step * -(-max(states) // (step * token_bytes))
        block_size = max(block_size, -(-least // _KERNEL_BLOCK) * _KERNEL_BLOCK)
        state_page = block_size * token_bytes
    pages: dict[int, _Pages] = {}
    for i, layer in enumerate(attention):
        if layer.state is not None:
            nbytes = layer.state.nbytes(size)
            pages[i] = _Pages("state", (nbytes,), block_size, max(nbytes, state_page), states=layer.state.copies)
        elif i in tokens:
            form = (_heads_on_rank(layer, size), layer.key_size, layer.value_size)
            assert layer.kind in ("full", "mla", "sliding", "chunked")
            pages[i] = _Pages(layer.kind, form, block_size, block_size * tokens[i], layer.window)
    return _grouped(pages)


_KERNEL_BLOCK = 16
"""Blocks of the attention kernels on CUDA are multiples of so many tokens."""


def _caches(layer: AttentionLayer) -> bool:
    return layer.kind in ("full", "mla", "sliding", "chunked")


def _heads_on_rank(layer: AttentionLayer, ranks: int) -> int:
    return 1 if layer.kind == "mla" else max(layer.kv_heads // ranks, 1)


def _token_bytes(layer: AttentionLayer, ranks: int, element_bytes: int) -> int:
    return _heads_on_rank(layer, ranks) * (layer.key_size + layer.value_size) * element_bytes


def _grouped(pages: dict[int, _Pages]) -> list[LayerGroup]:
    kinds = set(pages.values())
    if len(kinds) <= 1 or all(p.kind in ("full", "mla") for p in kinds) or _same_window(kinds):
        return [_group(pages, list(pages))] if pages else []
    pages = _of_one_size(pages)
    alike: dict[_Pages, list[int]] = {}
    for i, page in pages.items():
        alike.setdefault(page, []).append(i)
    least, most = min(map(len, alike.values())), max(map(len, alike.values()))
    size = most if most < 1.5 * least else least
    groups = []
    for layers in alike.values():
        count = -(-len(layers) // size)
        groups += [_group(pages, layers[i::count]) for i in range(count)]
    return groups


def _same_window(kinds: set[_Pages]) -> bool:
    return len({(p.kind, p.window) for p in kinds}) == 1 and all(p.kind in ("sliding", "chunked") for p in kinds)


def _group(pages: dict[int, _Pages], layers: list[int]) -> LayerGroup:
    first = pages[layers[0]]
    sizes = {i: pages[i].page_bytes for i in layers}
    return LayerGroup(sizes, first.block_size, first.window, first.kind == "chunked", first.states)


def _of_one_size(pages: dict[int, _Pages]) -> dict[int, _Pages]:
    """All as large as the largest: of more tokens where that divides, else padded (`unify_kv_cache_spec_page_size`)."""
    largest = max(page.page_bytes for page in pages.values())

    def grown(page: _Pages) -> _Pages:
        factor, rest = divmod(largest, page.page_bytes)
        if page.kind == "state" or rest:
            return replace(page, page_bytes=largest)
        return replace(page, block_size=page.block_size * factor, page_bytes=largest)

    return {i: grown(page) for i, page in pages.items()}
