"""The model with any assignment, run block by block: its divergence from the original, and the slope of it."""

from allocator.student.slopes import Slopes, measure_slopes
from allocator.student.student import Losses, Student

__all__ = ["Losses", "Slopes", "Student", "measure_slopes"]
