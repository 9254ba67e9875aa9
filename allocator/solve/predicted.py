"""The predicted loss of a given assignment: what the solver minimises, read for an assignment that it did not make."""

import math
from collections.abc import Mapping

import numpy as np

from allocator.contract.errors import ContractError
from allocator.contract.layout import ModuleFormat
from allocator.contract.scores import Scores

__all__ = ["predicted_loss", "single_losses"]


def single_losses(scores: Scores, assignment: Mapping[str, ModuleFormat]) -> dict[str, float]:
    """The score of each module's candidate. Raises ContractError for a format that the scores do not have."""
    found = {}
    for name, form in assignment.items():
        module = scores.modules.get(name)
        score = None if module is None else next((c.score for c in module.candidates if c.format == form), None)
        if score is None:
            raise ContractError(
                f"{name}: the scores {scores.digest} have no candidate of {form.num_bits} bits and group size "
                f"{form.group_size}; give the scores that the assignment was solved from"
            )
        found[name] = score
    return found


def predicted_loss(scores: Scores, assignment: Mapping[str, ModuleFormat]) -> float:
    """sum_i s_i + 2 sum_{i<j} r_ij sqrt(s_i s_j) over the assignment's candidates, in `scores.unit`; without
    interactions the sum of scores. Equals `Solution.objective`. Raises ContractError as `single_losses`.
    """
    singles = single_losses(scores, assignment)
    total = math.fsum(singles.values())
    if scores.interactions is None:
        return total
    chosen = [(i, c.score) for i, (name, c) in enumerate(scores.interacting()) if assignment[name] == c.format]
    root, above = np.sqrt([score for _, score in chosen]), np.triu_indices(len(chosen), 1)
    correlations = scores.interactions.among([i for i, _ in chosen])[above].astype(np.float64)
    return total + 2 * float((correlations * root[above[0]] * root[above[1]]).sum())
