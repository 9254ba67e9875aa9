"""Stage I: learn what each width of each module costs, once, for every budget."""

from allocator.score.learn import learn_scores
from allocator.score.settings import LearningSettings

__all__ = ["LearningSettings", "learn_scores"]
