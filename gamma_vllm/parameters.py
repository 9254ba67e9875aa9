"""Flat parameters: all shards of a layer in one 1-D tensor, each shard in its window.

Shards of different widths have rows of different lengths, so no rectangle holds them. A flat tensor with a
shard table has its final size from the start: vLLM's dummy load, layerwise reload and offloading need that.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from vllm.model_executor.parameter import BasevLLMParameter

from allocator.contract.errors import ContractError
from allocator.contract.packing import pack_zero_points, unpack_zero_points
from gamma_vllm.memory import empty_weight
from gamma_vllm.shards import CheckpointModule, Shard, Window

__all__ = ["FlatParameter", "join_zero_points", "load_flat", "slice_tensor"]

_READ_AS_LOADED = ("weight_packed", "weight_scale", "weight")
"""What the native kernel multiplies with as it is; of the rest it makes something else, or nothing."""

_QKV = {"q": 0, "k": 1, "v": 2}


class FlatParameter(BasevLLMParameter):
    """One tensor kind (`part`) of a layer: 1-D, the windows of its shards one after the other.

    `loaded` holds the indices of the shards that were loaded. It is replaced, never changed in place: vLLM
    copies the attributes of a parameter shallowly and restores them before a reload.
    """

    def __init__(
        self,
        data: Tensor,
        *,
        part: str,
        table: Mapping[int, Window],
        prefix: str,
        loader: Callable[..., Any] | None = None,
    ):
        super().__init__(data=data, weight_loader=loader or load_flat)
        self.part = part
        self.table = dict(table)
        self.prefix = prefix
        self.loaded: frozenset[int] = frozenset()

    @classmethod
    def empty(
        cls,
        part: str,
        table: Mapping[int, Window],
        dtype: torch.dtype,
        prefix: str,
        loader: Callable[..., Any] | None = None,
    ) -> Self:
        numel = sum(window.numel for window in table.values())
        data = empty_weight(part, numel, dtype) if part in _READ_AS_LOADED else torch.empty(numel, dtype=dtype)
        return cls(data, part=part, table=table, prefix=prefix, loader=loader)

    def window(self, index: int) -> Tensor:
        """View of shard `index` in its shape."""
        window = self.table[index]
        return self.data.narrow(0, window.offset, window.numel).view(window.shape)

    def missing(self) -> list[str]:
        """Checkpoint tensors that have not been loaded."""
        names = [f"{w.shard.module.name}.{self.part}" for i, w in self.table.items() if i not in self.loaded]
        return list(dict.fromkeys(names))

    def load_shard(self, index: int, loaded_weight: Tensor) -> None:
        """Copy this rank's slice of a checkpoint tensor into the window of shard `index`."""
        window = self.table.get(index)
        if window is None:
            raise ContractError(
                f"layer {self.prefix}: the checkpoint has a {self.part} for shard {index}, "
                "which has none at its declared width"
            )
        target = self.window(index)
        if target.is_meta:
            # A reload first counts the elements that are copied to meta tensors. Slicing would count as well.
            _check_shape(window.shard.module, self.part, loaded_weight)
            target.copy_(torch.empty_like(target))
            return
        target.copy_(_filled(slice_tensor(window.shard, self.part, loaded_weight), target))
        self.loaded = self.loaded | {index}


def load_flat(param: Any, loaded_weight: Tensor, loaded_shard_id: Any = None) -> None:
    """The weight loader of flat parameters. vLLM needs the name `param` for the first argument.

    It stands in for the layers' own loaders, so that replicated, column, row and fused layers go one way.
    `loaded_shard_id`: "q", "k", "v", an index, a tuple of indices, or None for a layer of one module.
    """
    if loaded_shard_id is None:
        indices = list(param.table)
    elif isinstance(loaded_shard_id, tuple):
        indices = [i for i in loaded_shard_id if i in param.table]
    else:
        indices = [_QKV.get(loaded_shard_id, loaded_shard_id)]
    names = {param.table[i].shard.module.name for i in indices if i in param.table}
    if len(names) > 1:
        raise ContractError(
            f"layer {param.prefix}: one {param.part} of shape {list(loaded_weight.shape)} was given for "
            f"{', '.join(sorted(names))}; their tensors must be stored one by one"
        )
    for index in indices:
        param.load_shard(index, loaded_weight)


def _filled(part: Tensor, target: Tensor) -> Tensor:
    """`part` with rows of zeros below, up to those of `target`: a padded vocabulary."""
    missing = target.shape[0] - part.shape[0]
    return part if not missing else torch.cat([part, part.new_zeros(missing, *part.shape[1:])])


def _check_shape(module: CheckpointModule, part: str, tensor: Tensor) -> None:
    whole = Shard(module, 0, module.format.shape[0], 0, module.format.shape[1])
    expected = (2,) if part == "weight_shape" else whole.shape(part)
    if tuple(tensor.shape) != expected:
        raise ContractError(
            f"{module.name}.{part}: shape {list(tensor.shape)} in the checkpoint, "
            f"{module.format.num_bits} bits at shape {list(module.format.shape)} need {list(expected or ())}"
        )
    if part == "weight_shape" and not tensor.is_meta and tensor.tolist() != list(module.format.shape):
        raise ContractError(
            f"{module.name}.weight_shape: {tensor.tolist()} in the checkpoint, "
            f"quantization_config says {list(module.format.shape)}"
        )


def slice_tensor(shard: Shard, part: str, tensor: Tensor) -> Tensor:
    """The part of a whole checkpoint tensor that `shard` is. Raises ContractError on an undeclared shape."""
    _check_shape(shard.module, part, tensor)
    if part == "weight_shape":
        return tensor
    if part == "weight_zero_point":
        return _slice_zero_points(shard, tensor)
    whole_columns = shard.module.format.shape[1]
    per_column = tensor.shape[1] / whole_columns
    start, count = round(shard.column_start * per_column), round(shard.columns * per_column)
    return tensor[shard.row_start : shard.row_start + shard.rows, start : start + count]


def _slice_zero_points(shard: Shard, packed: Tensor) -> Tensor:
    bits, group_size = shard.num_bits, shard.module.format.group_size or 1
    start, count = shard.column_start // group_size, shard.columns // group_size
    packed = packed[:, start : start + count]
    stop = shard.row_start + shard.rows
    if shard.row_start * bits % 32 == 0:  # bits after the last row do not count
        return packed[shard.row_start * bits // 32 : math.ceil(stop * bits / 32)]
    zero_points = unpack_zero_points(packed, bits, shard.module.format.shape[0])
    return pack_zero_points(zero_points[shard.row_start : stop], bits)


def join_zero_points(parts: list[Tensor], rows: list[int], num_bits: int) -> Tensor:
    """Packed zero points of neighbouring shards as those of one module of `sum(rows)` rows."""
    if len(parts) == 1:
        return parts[0]
    if all(count * num_bits % 32 == 0 for count in rows[:-1]):
        return torch.cat(parts)
    unpacked = [unpack_zero_points(p, num_bits, n) for p, n in zip(parts, rows, strict=True)]
    return pack_zero_points(torch.cat(unpacked), num_bits)
