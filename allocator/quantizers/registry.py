"""Quantizers by name: ours, and those that other packages register under the entry point `gamma.quantizers`."""

from importlib.metadata import entry_points

from allocator.contract.errors import InputError
from allocator.quantizers.base import Quantizer
from allocator.quantizers.gptq import Gptq
from allocator.quantizers.mse import MeanSquaredError
from allocator.quantizers.rtn import RoundToNearest

__all__ = ["get_quantizer", "quantizer_names"]

_OURS: dict[str, type[Quantizer]] = {"rtn": RoundToNearest, "mse": MeanSquaredError, "gptq": Gptq}


def quantizer_names() -> list[str]:
    return [*_OURS, *(e.name for e in entry_points(group="gamma.quantizers") if e.name not in _OURS)]


def get_quantizer(name: str) -> Quantizer:
    """The quantizer called `name`. Raises InputError with the known names."""
    if name in _OURS:
        return _OURS[name]()
    for entry in entry_points(group="gamma.quantizers"):
        if entry.name == name:
            quantizer: Quantizer = entry.load()()
            return quantizer
    raise InputError(f"quantizer {name!r} is not known; choose from {', '.join(quantizer_names())}")
