"""The methods that give scores, one file each: what `gamma learn --method` chooses from."""

from collections.abc import Callable

from allocator.learning.methods.gamma import learn_gamma
from allocator.learning.methods.measured import learn_measured
from allocator.learning.methods.relaxed import learn_relaxed
from allocator.learning.methods.task import Task
from allocator.learning.tables import Table

__all__ = ["METHODS", "Task"]

METHODS: dict[str, Callable[[Task], Table]] = {
    "gamma": learn_gamma,
    "relaxed": learn_relaxed,
    "measured": learn_measured,
}
"""By name, as `LearningSettings.method` gives it, a function that scores the candidates of a `Task`. A program that
compares methods puts its own in."""
