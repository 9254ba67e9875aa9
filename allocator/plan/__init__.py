"""From hardware and traffic to bytes: the GPU catalogue, vLLM's memory model, and the plan. No torch."""

from allocator.plan.gpus import Catalogue, Device, Gpu, find_gpu, load_catalogue, memory_device
from allocator.plan.plan import PlannedWeights, make_plan
from allocator.plan.schema import Plan, PlanRequest

__all__ = [
    "Catalogue",
    "Device",
    "Gpu",
    "Plan",
    "PlanRequest",
    "PlannedWeights",
    "find_gpu",
    "load_catalogue",
    "make_plan",
    "memory_device",
]
