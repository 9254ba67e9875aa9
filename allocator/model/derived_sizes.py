"""Sizes that a model class computes from its config in other ways than by products and sums."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from allocator.contract.errors import InputError

__all__ = ["DERIVED", "DerivedSize"]


@dataclass(frozen=True)
class DerivedSize:
    """`size(config)` for configs that have the keys `of`; `defaults` are other names of keys it begins with."""

    of: tuple[str, ...]
    size: Callable[[Mapping[str, Any]], int]
    defaults: Mapping[str, str]


def _lfm2_feed_forward(config: Mapping[str, Any]) -> int:
    """LFM2's feed-forward size: two thirds of what its config says, up to a multiple (`Lfm2MLP` of transformers)."""
    size = config.get("block_ff_dim", config.get("intermediate_size"))
    multiple, factor = config.get("block_multiple_of", 256), config.get("block_ffn_dim_multiplier", 1.0)
    for key, value in (("intermediate_size", size), ("block_multiple_of", multiple)):
        if type(value) is not int or value < 1:
            raise InputError(f"config.json: {key} must be a positive integer, given {value!r:.40}")
    if factor is not None and not isinstance(factor, int | float):
        raise InputError(f"config.json: block_ffn_dim_multiplier must be a number, given {factor!r:.40}")
    assert isinstance(size, int)
    assert isinstance(multiple, int)
    if not config.get("block_auto_adjust_ff_dim", True):
        return size
    size = int(2 * size / 3)
    if factor is None:
        return size
    return multiple * ((int(factor * size) + multiple - 1) // multiple)


def _num_labels(config: Mapping[str, Any]) -> int:
    """The scores of a classifier, which config.json often tells by their names only (`PreTrainedConfig.num_labels`)."""
    names, count = config.get("id2label"), config.get("num_labels")
    if count is None:
        count = len(names) if isinstance(names, dict) else 2
    if type(count) is not int or count < 1:
        raise InputError(f"config.json: num_labels must be a positive integer, given {count!r:.40}")
    return count


DERIVED = {
    "lfm2_feed_forward": DerivedSize(
        of=("intermediate_size", "block_multiple_of", "block_ffn_dim_multiplier", "block_auto_adjust_ff_dim"),
        size=_lfm2_feed_forward,
        defaults={"intermediate_size": "block_ff_dim"},
    ),
    "num_labels": DerivedSize(of=("id2label", "num_labels"), size=_num_labels, defaults={}),
}
"""By the name that stands for the size in rules."""
