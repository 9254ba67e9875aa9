"""After solving: assignments judged by the KL divergence that they measure, not by their scores."""

from allocator.refining.search import Refined, refine
from allocator.refining.steps import open_student, refine_manifest, verify
from allocator.refining.uniform import uniform_assignments

__all__ = ["Refined", "open_student", "refine", "refine_manifest", "uniform_assignments", "verify"]
