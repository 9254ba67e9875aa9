"""What is done to the stream of a checkpoint's tensors before vLLM maps their names."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from vllm.model_executor.models.utils import WeightsMapper

from allocator.contract.layout import ModuleFormat
from allocator.contract.packing import dequantize, pack_zero_points, unpack_zero_points
from gamma_vllm.shards import CheckpointModule

__all__ = [
    "ExpertPlace",
    "StreamMapper",
    "load_experts",
    "mappings",
    "turn_candidates",
    "turn_zero_points",
    "with_weight",
]


class StreamMapper(WeightsMapper):
    """A mapper of vLLM that hands the stream of weights through `steps` before it maps the names.

    vLLM joins mappers with `|`; `__ror__` of a subclass comes first there, so the joined mapper is a StreamMapper too.
    """

    def __init__(self, steps: tuple[Callable[[Any], Any], ...] = (), **names: Any):
        super().__init__(**names)
        self.steps = steps

    def __or__(self, other: WeightsMapper) -> "StreamMapper":
        more = other.steps if isinstance(other, StreamMapper) else ()
        return StreamMapper(self.steps + more, **mappings(super().__or__(other)))

    def __ror__(self, other: WeightsMapper) -> "StreamMapper":
        return StreamMapper(self.steps, **mappings(WeightsMapper.__or__(other, self)))

    def apply(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        for step in self.steps:
            weights = step(weights)
        return super().apply(weights)


def mappings(mapper: WeightsMapper) -> dict[str, Any]:
    """What a mapper maps, as the arguments that make another like it."""
    return {field.name: getattr(mapper, field.name) for field in fields(WeightsMapper)}


@dataclass(frozen=True)
class ExpertPlace:
    """Where a module of the checkpoint lies: in the parameters `stack` of `layer`, as `shard` of expert `expert`."""

    layer: Any
    stack: str
    shard: str
    expert: int


def load_experts(places: dict[str, ExpertPlace], weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The stream without the tensors of the modules in `places`, which are loaded here: some models of vLLM read the
    experts of a block from one tensor only."""
    for name, tensor in weights:
        module, _, part = name.rpartition(".")
        place = places.get(module)
        if place is None:
            yield name, tensor
            continue
        parameter = getattr(place.layer, f"{place.stack}_{part}")
        parameter.weight_loader(
            parameter, tensor, weight_name=name, shard_id=place.shard, expert_id=place.expert, return_success=True
        )


def turn_candidates(
    modules: Mapping[str, ModuleFormat], heads: Mapping[str, int], weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The stream from a bank with codes and scales turned as `turn_zero_points` turns zero points: vLLM's Llama 4 turns
    what it is given, which are the weights of the source that they take the place of."""
    for name, tensor in weights:
        module, _, part = name.rpartition(".")
        count = heads.get(module.rpartition(".")[2])
        if part in ("weight_packed", "weight_scale") and count is not None and module in modules:
            tensor = _turned(tensor, count)
        yield name, tensor


def _turned(rows: Tensor, heads: int) -> Tensor:
    """rows: `[N, ...]`, N rows of `heads` heads, of each of which the two halves of the pairs are put together."""
    return rows.view(heads, -1, 2, rows.shape[1]).transpose(1, 2).flatten(0, 2).contiguous()


def turn_zero_points(
    modules: Mapping[str, ModuleFormat], heads: Mapping[str, int], weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The stream with the zero points of those of `modules` whose leaf is in `heads` (the number of heads of their
    rows) in the order of rows into which vLLM's Llama 4 turns their codes and scales for its rotary embedding; packed
    along the rows, they are left as they are there (`permute_qk_weight_for_rotary`)."""
    for name, tensor in weights:
        module, _, part = name.rpartition(".")
        count = heads.get(module.rpartition(".")[2])
        if part != "weight_zero_point" or count is None or module not in modules:
            yield name, tensor
            continue
        form = modules[module]
        rows = unpack_zero_points(tensor, form.num_bits, form.shape[0])
        yield name, pack_zero_points(_turned(rows, count), form.num_bits)


def with_weight(
    module: CheckpointModule, instead: bool, weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The stream with the weight of the quantized `module`, dequantized, behind its tensors, or `instead` of them."""
    parts: dict[str, Tensor] = {}
    wanted = {"weight_packed", "weight_scale", *([] if module.format.symmetric else ["weight_zero_point"])}
    for name, tensor in weights:
        of, _, part = name.rpartition(".")
        if of != module.name:
            yield name, tensor
            continue
        if not instead:
            yield name, tensor
        if part in wanted:
            parts[part] = tensor.clone()  # whoever reads the files may use its memory again
        if parts.keys() == wanted:
            packed, scale, zero_point = (parts.get(p) for p in ("weight_packed", "weight_scale", "weight_zero_point"))
            assert packed is not None
            assert scale is not None
            yield f"{module.name}.weight", dequantize(packed, scale, zero_point, module.format.num_bits)
            parts = {}
