"""Stage I: learn what each width of each module costs, once, for every budget."""

from allocator.learning.learn import learn_scores
from allocator.learning.settings import LearningSettings

__all__ = ["LearningSettings", "learn_scores"]
