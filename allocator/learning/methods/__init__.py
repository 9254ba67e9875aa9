"""The methods that give scores, one file each: what `gamma learn --method` chooses from."""

from collections.abc import Callable

from allocator.learning.methods.deltaloss import learn_deltaloss
from allocator.learning.methods.fisher import learn_fisher
from allocator.learning.methods.gamma import learn_gamma
from allocator.learning.methods.measured import learn_measured
from allocator.learning.methods.relaxed import learn_relaxed
from allocator.learning.methods.task import Task
from allocator.learning.methods.uniform import learn_uniform
from allocator.learning.tables import Table

__all__ = ["METHODS", "Task"]

METHODS: dict[str, Callable[[Task], Table]] = {
    "gamma": learn_gamma,
    "relaxed": learn_relaxed,
    "measured": learn_measured,
    "fisher": learn_fisher,
    "deltaloss": learn_deltaloss,
    "uniform": learn_uniform,
}
