"""After solving: assignments judged by the KL divergence that they measure, not by their scores."""

from allocator.refining.search import Refined, refine
from allocator.refining.uniform import uniform_assignment

__all__ = ["Refined", "refine", "uniform_assignment"]
