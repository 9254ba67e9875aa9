"""The reduced program solved by dynamic programming over a core that grows: for programs of thousands of units.

A state is what deviations from the relaxation's choices have cost so far. Units enter in order of what a byte costs
at least to move with them, so that states which no later unit can save at that price are dropped; when none is left,
the best assignment found is proven (Pisinger, A minimal algorithm for the multiple-choice knapsack problem, EJOR
83, 1995).
"""

import math
import time

import numpy as np
from numpy.typing import NDArray

from allocator.solve.linear_relaxation import Item, Picks, Relaxed, total_bytes, total_gain

__all__ = ["MOST_STATES", "improve"]

MOST_STATES = 40_000_000

_ROUNDING = 1e-12

Stage = tuple[int, list[int], NDArray[np.int32], NDArray[np.int8]]
"""A unit, its options (the first is the relaxation's), and by state its parent among the states before and option."""


def improve(
    relaxed: Relaxed,
    kept: list[list[int]],
    picks: Picks,
    deadline: float = math.inf,
    most_states: int = MOST_STATES,
) -> tuple[Picks, bool]:
    """The best assignment with the choices `kept` (those that `survivors` leaves for `picks`), and whether that is
    proven. It is not when more than `most_states` states are looked at, or `deadline` (of `time.monotonic`) is past;
    then `picks` may have become better."""
    items, price = relaxed.units, relaxed.multiplier
    values = [[item.gain - price * item.nbytes for item in unit] for unit in items]
    base = [max(range(len(row)), key=row.__getitem__) for row in values]
    room = relaxed.slack_bytes - total_bytes(items, base)
    best = relaxed.bound - total_gain(items, picks)
    units = sorted((_ratio(u, items, values, base, js), u) for u, js in enumerate(kept) if len({*js, base[u]}) > 1)
    moved, cost = np.zeros(1, np.int64), np.zeros(1)
    stages: list[Stage] = []
    found: tuple[int, int] | None = None
    if room >= 0 and price * room < best * (1 - _ROUNDING):
        best, found = price * room, (0, 0)
    looked_at = 0
    for ratio, u in units:
        left = room - moved
        bound = cost + np.where(left < 0, -left * ratio, left * min(ratio, price))
        alive = np.flatnonzero(bound < best * (1 - _ROUNDING))
        if not alive.size:
            return _trace(base, stages, found, picks), True
        options = [base[u], *(j for j in kept[u] if j != base[u])]
        steps = [items[u][j].nbytes - items[u][base[u]].nbytes for j in options]
        penalties = [values[u][base[u]] - values[u][j] for j in options]
        moved, cost, parents, chosen = _extend(moved[alive], cost[alive], alive, steps, penalties, price, best)
        stages.append((u, options, parents, chosen))
        left = room - moved
        total = np.where(left >= 0, cost + price * left, math.inf)
        at = int(total.argmin()) if total.size else 0
        if total.size and total[at] < best * (1 - _ROUNDING):
            best, found = float(total[at]), (len(stages), at)
        looked_at += moved.size
        if looked_at > most_states or time.monotonic() > deadline:
            return _trace(base, stages, found, picks), False
    return _trace(base, stages, found, picks), True


def _ratio(u: int, items: list[list[Item]], values: list[list[float]], base: list[int], kept: list[int]) -> float:
    """The least that a byte costs to move with unit u."""
    ratios = [
        (values[u][base[u]] - values[u][j]) / abs(items[u][j].nbytes - items[u][base[u]].nbytes)
        for j in kept
        if j != base[u]
    ]
    return min(ratios)


def _extend(
    moved: NDArray[np.int64],
    cost: NDArray[np.float64],
    parents: NDArray[np.int64],
    steps: list[int],
    penalties: list[float],
    price: float,
    best: float,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int32], NDArray[np.int8]]:
    """All states with each option of one more unit, less those that another beats: no more bytes and no less gain."""
    all_moved = np.concatenate([moved + step for step in steps])
    all_cost = np.concatenate([cost + penalty for penalty in penalties])
    all_parents = np.tile(parents, len(steps))
    all_options = np.repeat(np.arange(len(steps), dtype=np.int8), moved.size)
    below = all_cost < best
    all_moved, all_cost = all_moved[below], all_cost[below]
    all_parents, all_options = all_parents[below], all_options[below]
    order = np.lexsort((all_cost, all_moved))
    gains = price * all_moved[order] - all_cost[order]
    highest = np.maximum.accumulate(gains)
    keep = np.ones(order.size, bool)
    keep[1:] = gains[1:] > highest[:-1]
    order = order[keep]
    return all_moved[order], all_cost[order], all_parents[order].astype(np.int32), all_options[order]


def _trace(base: Picks, stages: list[Stage], found: tuple[int, int] | None, picks: Picks) -> Picks:
    """The choices of the state `found`; `picks` if nothing better than them was found."""
    if found is None:
        return picks
    result, (depth, state) = list(base), found
    for u, options, parents, chosen in reversed(stages[:depth]):
        result[u] = options[chosen[state]]
        state = int(parents[state])
    return result
