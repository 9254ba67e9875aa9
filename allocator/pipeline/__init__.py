"""The steps of the data flow, from a request to a result: what each verb of the command line calls.

Names are looked up when they are asked for: some steps need torch, and others must not wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allocator.pipeline.exporting import export
    from allocator.pipeline.fitting import FitRequest, FitResult, GpuTarget, fit
    from allocator.pipeline.learning import LearnResult, learn
    from allocator.pipeline.model_folder import resolve_model
    from allocator.pipeline.settings import CandidateSettings
    from allocator.solve import SolveSettings, solve_scores

__all__ = [
    "CandidateSettings",
    "FitRequest",
    "FitResult",
    "GpuTarget",
    "LearnResult",
    "SolveSettings",
    "export",
    "fit",
    "learn",
    "resolve_model",
    "solve_scores",
]

_MODULES = {
    "allocator.pipeline.exporting": ("export",),
    "allocator.pipeline.fitting": ("FitRequest", "FitResult", "GpuTarget", "fit"),
    "allocator.pipeline.learning": ("LearnResult", "learn"),
    "allocator.pipeline.model_folder": ("resolve_model",),
    "allocator.pipeline.settings": ("CandidateSettings",),
    "allocator.solve": ("SolveSettings", "solve_scores"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
