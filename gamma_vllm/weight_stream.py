"""What is done to the stream of a checkpoint's tensors before vLLM maps their names."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from vllm.model_executor.models.utils import WeightsMapper

__all__ = ["ExpertPlace", "StreamMapper", "load_experts", "mappings"]


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
