"""What quantization does to a model, in KL divergence from the original; assignments verified and improved by it."""

from allocator.evaluate.dequantized import load_dequantized
from allocator.evaluate.divergence import Divergence, measure_divergence
from allocator.evaluate.refinement import Refined, RefineSettings, refine
from allocator.evaluate.student import Losses, Student
from allocator.evaluate.student_gradients import StudentGradients, measure_gradients
from allocator.evaluate.verification import open_student, refine_manifest, uniform_assignments, verify_against_uniform

__all__ = [
    "Divergence",
    "Losses",
    "RefineSettings",
    "Refined",
    "Student",
    "StudentGradients",
    "load_dequantized",
    "measure_divergence",
    "measure_gradients",
    "open_student",
    "refine",
    "refine_manifest",
    "uniform_assignments",
    "verify_against_uniform",
]
