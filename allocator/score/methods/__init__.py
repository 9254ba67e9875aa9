"""The methods that give scores, one file each: what `gamma learn --method` chooses from."""

from collections.abc import Callable

from allocator.score.methods.gamma import learn_gamma
from allocator.score.methods.measured import learn_measured
from allocator.score.methods.relaxed import learn_relaxed
from allocator.score.methods.uniform import learn_uniform
from allocator.score.tables import Table
from allocator.score.task import Task

__all__ = ["METHODS", "Task"]

METHODS: dict[str, Callable[[Task], Table]] = {
    "gamma": learn_gamma,
    "relaxed": learn_relaxed,
    "measured": learn_measured,
    "uniform": learn_uniform,
}
"""By name, as `LearningSettings.method` gives it, a function that scores the candidates of a `Task`. A program that
compares methods puts its own in."""
