"""Quantizers by name: ours, and those that other packages register under the entry point `gamma.quantizers`."""

import inspect
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from allocator.contract.errors import InputError
from allocator.quantize.gptq import Gptq
from allocator.quantize.kfac import Kfac
from allocator.quantize.learned_rounding import LearnedRounding
from allocator.quantize.mse import MeanSquaredError
from allocator.quantize.quantizer import Quantizer
from allocator.quantize.rtn import RoundToNearest

__all__ = ["get_quantizer", "quantizer_names"]

_OURS: dict[str, Callable[..., Quantizer]] = {
    "rtn": RoundToNearest,
    "mse": MeanSquaredError,
    "gptq": Gptq,
    "kfac": Kfac,
    "learned-rounding": LearnedRounding,
}


def quantizer_names() -> list[str]:
    return [*_OURS, *(e.name for e in entry_points(group="gamma.quantizers") if e.name not in _OURS)]


def get_quantizer(spec: str) -> Quantizer:
    """The quantizer that `spec` names, with settings if it has any: `gptq`, `gptq:damping=0.05`.

    Settings are numbers; several are separated by commas. They become part of the quantizer's name, so that banks tell
    them apart. Raises InputError with the known names or settings.
    """
    name, _, text = spec.partition(":")
    make = _factory(name)
    settings = dict(_setting(spec, part) for part in text.split(",")) if text else {}
    allowed = [key for key in inspect.signature(make).parameters if key not in ("args", "kwargs")]
    if unknown := sorted(settings.keys() - set(allowed)):
        raise InputError(
            f"quantizer {spec!r}: {name} has no setting {unknown[0]!r}; it has {', '.join(allowed) or 'none'}"
        )
    quantizer = make(**settings)
    if settings:
        quantizer.name = f"{name}:" + ",".join(f"{key}={settings[key]:g}" for key in sorted(settings))
    return quantizer


def _factory(name: str) -> Callable[..., Quantizer]:
    if name in _OURS:
        return _OURS[name]
    for entry in entry_points(group="gamma.quantizers"):
        if entry.name == name:
            loaded: Callable[..., Quantizer] = entry.load()
            return loaded
    raise InputError(f"quantizer {name!r} is not known; choose from {', '.join(quantizer_names())}")


def _setting(spec: str, part: str) -> tuple[str, Any]:
    key, _, value = part.partition("=")
    try:
        return key.strip(), float(value)
    except ValueError:
        raise InputError(f"quantizer {spec!r}: expected NAME:setting=number, given {part!r}") from None
