"""Scores with interactions: a quadratic program over the widths, solved by descent from the exact linear answer.

What two modules' errors do together is not the sum of what each does alone. With pairwise terms the loss of an
assignment is sum_i s_i + 2 sum_{i<j} q_ij over its chosen candidates. The exact integer program over s alone gives the
start; from there the single change or pair of changes within the budget that gains most is taken, until none gains.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allocator.contract.scores import Interactions, Scores
from allocator.solve.units import Choice, Unit

__all__ = [
    "Quadratic",
    "coordinate_descent",
    "interactions_among",
    "local_search",
    "lower_bound",
    "pair_terms",
    "quadratic_of",
]

_DISTURBED, _MOST_DISTURBANCES, _EFFORT = 4, 80, 20_000_000
_REACH = 2
"""How many choices up and down from the present one are tried in a pair of changes."""


@dataclass(frozen=True)
class Quadratic:
    """All choices of all units in one row: `unit`, `nbytes`, `linear` `[P]`, `pairs` and `within` `[P, P]`.

    `pairs` is symmetric, zero inside a unit. `within` has the inner products of the errors of choices of one unit, zero
    elsewhere: with `pairs` and these the loss is a square, and has slopes. Choices of a unit are neighbours, fewest
    bytes first.
    """

    unit: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    linear: NDArray[np.float64]
    pairs: NDArray[np.float64]
    within: NDArray[np.float64]

    def value(self, chosen: NDArray[np.int64]) -> float:
        """Loss of an assignment, given as one position a unit."""
        return float(self.linear[chosen].sum() + self.pairs[np.ix_(chosen, chosen)].sum())

    def marginal(self, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
        """Loss that each choice has in company of the other units' chosen ones, `[P]`."""
        field: NDArray[np.float64] = self.linear + 2 * self.pairs[:, chosen].sum(1)
        return field


def pair_terms(scores: Scores) -> NDArray[np.float64]:
    """The terms q_ij of `scores.interacting()`, `[n, n]`, symmetric with 0 on the diagonal: r_ij sqrt(s_i s_j).

    All are 0 when the scores have no interactions.
    """
    candidates = [candidate for _, candidate in scores.interacting()]
    if scores.interactions is None:
        return np.zeros((len(candidates), len(candidates)))
    terms = scores.interactions.among(range(len(candidates))).astype(np.float64)
    root = np.sqrt([candidate.score for candidate in candidates])
    terms *= root[:, None] * root[None, :]
    return terms + terms.T


def interactions_among(scores: Scores, names: Collection[str]) -> Interactions | None:
    """The interactions of `scores` between the modules `names` alone, for scores that have only these.

    The least eigenvalue stays: a part of a matrix has none below it.
    """
    if scores.interactions is None:
        return None
    inside = [i for i, (name, _) in enumerate(scores.interacting()) if name in names]
    return Interactions.of(scores.interactions.among(inside), scores.interactions.least_eigenvalue)


def quadratic_of(scores: Scores, units: Sequence[Unit]) -> Quadratic:
    """The program over the choices of `units`; terms between members of one unit become part of its linear ones."""
    terms = pair_terms(scores)
    number = {(name, c.format.num_bits): i for i, (name, c) in enumerate(scores.interacting())}
    choices: list[tuple[int, Unit, Choice]] = [(u, unit, c) for u, unit in enumerate(units) for c in unit.choices]
    parts = np.zeros((len(choices), len(number)))
    for row, (_, unit, choice) in enumerate(choices):
        for name, form in zip(unit.members, choice.formats, strict=True):
            if (name, form.num_bits) in number:
                parts[row, number[name, form.num_bits]] = 1
    pairs = parts @ terms @ parts.T
    unit_of = np.array([u for u, _, _ in choices])
    linear = np.array([choice.score for _, _, choice in choices]) + np.diagonal(pairs)
    same = unit_of[:, None] == unit_of[None, :]
    within = np.where(same, pairs, 0.0)
    np.fill_diagonal(within, linear)
    pairs[same] = 0
    return Quadratic(unit_of, np.array([choice.nbytes for _, _, choice in choices]), linear, pairs, within)


def lower_bound(scores: Scores, linear_bound: float) -> float:
    """What no assignment costs less than, `linear_bound` being that on the sum of scores alone.

    A selection of candidates is a principal part of the matrix whose least eigenvalue the scores carry, and no part
    has a smaller one (Cauchy's interlacing): its cost is at least that eigenvalue times the sum of its scores.
    """
    assert scores.interactions is not None
    return max(0.0, math.nextafter(scores.interactions.least_eigenvalue, -math.inf)) * max(0.0, linear_bound)


def local_search(program: Quadratic, chosen: Sequence[int], budget_bytes: int, seed: int = 0) -> list[int]:
    """The best of `coordinate_descent` from `chosen` and from disturbed versions of the best: iterated local search.

    A disturbance moves a few units by one choice, and lowers others until the budget is kept. How many there are
    depends on the size of the program alone, so that the same program has the same answer.
    """
    chance = np.random.default_rng(seed)
    best = coordinate_descent(program, chosen, budget_bytes)
    least = program.value(np.array(best))
    positions = len(program.unit)
    smallest, units = np.searchsorted(program.unit, np.arange(len(best))), len(best)
    largest = np.searchsorted(program.unit, np.arange(len(best)), side="right") - 1
    for _ in range(min(_MOST_DISTURBANCES, _EFFORT // positions**2)):
        now = np.array(best)
        for unit in chance.choice(units, min(_DISTURBED, units), replace=False):
            now[unit] = np.clip(now[unit] + chance.choice((-1, 1)), smallest[unit], largest[unit])
        while program.nbytes[now].sum() > budget_bytes:
            now[chance.choice(np.flatnonzero(now > smallest))] -= 1
        found = coordinate_descent(program, [int(p) for p in now], budget_bytes)
        value = program.value(np.array(found))
        if value < least:
            best, least = found, value
    return best


def coordinate_descent(
    program: Quadratic, chosen: Sequence[int], budget_bytes: int, most_steps: int = 10_000
) -> list[int]:
    """Steepest descent over single changes and pairs of changes that keep within `budget_bytes`.

    `chosen` and the answer are positions in the row of choices, one a unit. Ends in an assignment that no change of
    one or two units (by at most two choices each, in pairs) improves.
    """
    now = np.array(chosen, dtype=np.int64)
    for _ in range(most_steps):
        own = now[program.unit]
        field = program.marginal(now)
        gain = field - field[own]
        cost = program.nbytes - program.nbytes[own]
        slack = budget_bytes - int(program.nbytes[now].sum())
        single = np.where(cost <= slack, gain, np.inf)
        best, change = float(single.min()), [int(single.argmin())]
        near = np.flatnonzero((np.abs(np.arange(len(own)) - own) <= _REACH) & (np.arange(len(own)) != own))
        mine = own[near]
        together = gain[near][:, None] + gain[near][None, :]
        together += 2 * (
            program.pairs[np.ix_(near, near)]
            - program.pairs[np.ix_(near, mine)]
            - program.pairs[np.ix_(mine, near)]
            + program.pairs[np.ix_(mine, mine)]
        )
        forbidden = (cost[near][:, None] + cost[near][None, :] > slack) | (
            program.unit[near][:, None] == program.unit[near][None, :]
        )
        together[forbidden] = np.inf
        if together.size and float(together.min()) < best:
            best = float(together.min())
            a, b = np.unravel_index(int(together.argmin()), together.shape)
            change = [int(near[a]), int(near[b])]
        if best >= -1e-12 * abs(program.value(now)):
            break
        for position in change:
            now[program.unit[position]] = position
    return [int(position) for position in now]
