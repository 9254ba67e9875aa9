"""From hardware and traffic to bytes: the GPU catalogue, vLLM's memory model, and the plan. No torch."""

from allocator.fitting.catalogue import Catalogue, Device, Gpu, find_gpu, load_catalogue, memory_device
from allocator.fitting.document import Plan
from allocator.fitting.plan import make_plan
from allocator.fitting.request import PlanRequest

__all__ = [
    "Catalogue",
    "Device",
    "Gpu",
    "Plan",
    "PlanRequest",
    "find_gpu",
    "load_catalogue",
    "make_plan",
    "memory_device",
]
