"""The linear relaxation of the program, solved greedily: a start, a bound, and what can be left out.

The program is a multiple-choice knapsack. Its relaxation is solved by taking upgrades along the convex hull
of each unit's (bytes, gain) points in order of gain a byte (Sinha and Zoltners, Oper. Res. 27, 1979).
The multiplier of the last one proves for most choices that no better assignment has them; only the rest goes
to the integer solver, which keeps its numbers few and small.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Item", "Picks", "Relaxed", "Upgrade", "fill", "relax", "survivors", "total_bytes", "total_gain", "upgrades"]


@dataclass(frozen=True)
class Item:
    """One choice of a unit: bytes above the unit's smallest choice, and the score that they save."""

    nbytes: int
    gain: float


Picks = list[int]
Upgrade = tuple[float, int, int, int, int]
"""(-gain a byte, unit, level on its hull, from choice, to choice)"""


@dataclass(frozen=True)
class Relaxed:
    """The relaxation of `units` for `slack_bytes` above the smallest assignment, solved.

    `picks` fit; no assignment gains more than `bound`; `multiplier` is the gain of one more byte.
    """

    units: list[list[Item]]
    slack_bytes: int
    picks: Picks
    bound: float
    multiplier: float


def total_bytes(units: list[list[Item]], picks: Picks) -> int:
    return sum(items[j].nbytes for items, j in zip(units, picks, strict=True))


def total_gain(units: list[list[Item]], picks: Picks) -> float:
    return math.fsum(items[j].gain for items, j in zip(units, picks, strict=True))


def upgrades(units: list[list[Item]]) -> list[Upgrade]:
    """The steps along the convex hulls of all units, the most gain a byte first; items rise in bytes and gain."""
    steps = []
    for u, items in enumerate(units):
        for level, (i, j) in enumerate(pairwise(_hull(items))):
            density = (items[j].gain - items[i].gain) / (items[j].nbytes - items[i].nbytes)
            steps.append((-density, u, level, i, j))
    return sorted(steps)


def relax(units: list[list[Item]], steps: list[Upgrade], slack_bytes: int) -> Relaxed:
    """Solve the relaxation for `slack_bytes` above the smallest assignment; `steps` are `upgrades(units)`."""
    picks, left, multiplier = [0] * len(units), slack_bytes, 0.0
    for negative_density, u, _, i, j in steps:
        needed = units[u][j].nbytes - units[u][i].nbytes
        if picks[u] == i and needed <= left:
            picks[u], left = j, left - needed
        elif not multiplier:
            multiplier = -negative_density
    values = (max(item.gain - multiplier * item.nbytes for item in items) for items in units)
    bound = math.fsum([*values, multiplier * slack_bytes])
    return Relaxed(units, slack_bytes, fill(units, picks, slack_bytes), bound, multiplier)


def fill(units: list[list[Item]], picks: Picks, slack_bytes: int) -> Picks:
    """Spend bytes that are left: the single upgrade that gains most, again and again, until none fits."""
    picks = list(picks)
    left = slack_bytes - total_bytes(units, picks)
    while True:
        best: tuple[float, int, int] | None = None
        for u, items in enumerate(units):
            for j in range(picks[u] + 1, len(items)):
                if items[j].nbytes - items[picks[u]].nbytes > left:
                    break
                gain = items[j].gain - items[picks[u]].gain
                if gain > 0 and (best is None or gain > best[0]):
                    best = (gain, u, j)
        if best is None:
            return picks
        _, u, j = best
        left -= units[u][j].nbytes - units[u][picks[u]].nbytes
        picks[u] = j


def survivors(relaxed: Relaxed, picks: Picks, at_most: int | None = None) -> list[list[int]]:
    """Of each unit the choices that an assignment at least as good as `picks` may have.

    With `at_most` only about that many of them, the most promising: then the optimum may be missing, but an
    assignment that fits is always left.
    """
    units = relaxed.units
    values = [[item.gain - relaxed.multiplier * item.nbytes for item in items] for items in units]
    penalties = [[max(row) - value for value in row] for row in values]
    rounding = 1e-11 * math.fsum(items[-1].gain for items in units)
    margin = relaxed.bound - total_gain(units, picks) + rounding
    if at_most is not None:
        ranked = sorted(p for row in penalties for p in row if p > 0)
        if len(ranked) > at_most:
            margin = min(margin, max(ranked[at_most], rounding))
    return [[j for j, penalty in enumerate(row) if penalty <= margin] for row in penalties]


def _hull(items: list[Item]) -> list[int]:
    """Indices of the upper convex hull of (bytes, gain)."""
    hull: list[int] = []
    for j, item in enumerate(items):
        while len(hull) > 1:
            a, b = items[hull[-2]], items[hull[-1]]
            turn = (b.gain - a.gain) * (item.nbytes - b.nbytes) - (item.gain - b.gain) * (b.nbytes - a.nbytes)
            if turn > 0:
                break
            hull.pop()
        hull.append(j)
    return hull
