"""Local search for one budget: changes of one or two modules, kept when the measured KL divergence says so.

One backward pass gives the gradient of the KL along every candidate at the present assignment. Slope and curvature (the
Fisher metric's, from the scores) rank all changes of one or two modules within the budget; the most promising are
measured one after the other on the same text, and a change is kept if the mean of the paired differences by sequence is
below zero by more than the chance of so many tries. When enough are kept, or none is, the gradients are read anew.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from allocator.contract.errors import InputError
from allocator.contract.layout import ModuleFormat
from allocator.contract.scores import Scores
from allocator.evaluate.student import Student
from allocator.evaluate.student_gradients import measure_gradients
from allocator.run.progress import Progress, silent
from allocator.solve.quadratic import Quadratic, quadratic_of
from allocator.solve.units import NO_RULES, Rules, units_of

__all__ = ["FAILURES", "RefineSettings", "Refined", "below_zero", "refine"]

_CURVATURE = 1.2
"""Curvature of the KL at an assignment by that at the original model: measured 1.1 to 1.3 between 2 and 3 bits."""
FAILURES = 6
"""The search gives up after so many changes in a row that are not kept."""
_ERRORS = 2.4
"""How many standard errors below zero a mean difference must be: one-sided, 5 % shared by the `FAILURES` changes that
are measured before the search gives up. At 10 % for each, changes were kept that lost on other text."""


@dataclass(frozen=True)
class RefineSettings:
    """A budget that counts all tensors of the checkpoint, how many `seconds` of `clock` the search may take, what it
    must keep, and the seed of its order."""

    budget_bytes: int
    seconds: float
    rules: Rules = NO_RULES
    seed: int = 0
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True)
class Refined:
    """kl_before, kl: mean over the text before and after; kept, tried: changes."""

    assignment: dict[str, ModuleFormat]
    kl_before: float
    kl: float
    kept: int
    tried: int


def refine(
    student: Student,
    scores: Scores,
    assignment: Mapping[str, ModuleFormat],
    settings: RefineSettings,
    progress: Progress = silent,
) -> Refined:
    """Improve `assignment` for as long as `settings` allow, never over their budget.

    Raises InputError for an assignment that the scores and rules do not allow.
    """
    units = units_of(scores, settings.rules, "free")
    seconds, clock, room = settings.seconds, settings.clock, settings.budget_bytes - scores.other_bytes
    choices = [(unit.members[0], choice.formats[0]) for unit in units for choice in unit.choices]
    search = _Search(student, quadratic_of(scores, units), choices)
    now = search.positions(assignment)
    generator = torch.Generator().manual_seed(settings.seed)
    sequences = student.token_ids.shape[0]
    progress.begin("refining", round(seconds), "second")
    start = clock()
    kl = student.losses(search.plan(now), keep=True).kl
    before, kept, tried = float(kl.mean()), 0, 0
    while (elapsed := clock() - start) < seconds:
        progress.reach(elapsed, f"{kept} of {tried} changes kept")
        rows = torch.randperm(sequences, generator=generator)[: max(1, sequences // 2)]
        moves = search.moves(now, room, rows)
        done, failures, changed = kept, 0, set[int]()
        for move in moves:
            if failures == FAILURES or clock() - start >= seconds:
                break
            touched = {int(search.program.unit[p]) for p in move}
            then = now.copy()
            for position in move:
                then[search.program.unit[position]] = position
            if touched & changed or search.program.nbytes[then].sum() > room:
                continue
            tried += 1
            failures += 1
            progress.reach(clock() - start, f"{kept} of {tried} changes kept")
            some = torch.randperm(sequences, generator=generator)[: max(1, sequences // 4)]
            if float((student.losses(search.plan(then), rows=some).kl - kl[some]).mean()) >= 0:
                continue
            measured = student.losses(search.plan(then)).kl
            if below_zero(measured - kl):
                now, kept, failures = then, kept + 1, 0
                changed |= touched
                kl = student.losses(search.plan(now), keep=True).kl
        if kept == done:
            break
    return Refined(search.plan(now), before, float(kl.mean()), kept, tried)


@dataclass(frozen=True)
class _Search:
    """choices: module and format of every position of the program."""

    student: Student
    program: Quadratic
    choices: list[tuple[str, ModuleFormat]]

    def positions(self, assignment: Mapping[str, ModuleFormat]) -> NDArray[np.int64]:
        """The position of each module's format. Raises InputError for one that is not allowed."""
        found = [p for p, (name, form) in enumerate(self.choices) if assignment[name] == form]
        if len(found) != len({name for name, _ in self.choices}):
            missing = {name for name, _ in self.choices} - {self.choices[p][0] for p in found}
            name = sorted(missing)[0]
            raise InputError(
                f"{name}: the scores and rules have no candidate of {assignment[name].num_bits} bits; "
                "refine with the scores and rules that the manifest was solved with"
            )
        return np.array(found)

    def plan(self, now: NDArray[np.int64]) -> dict[str, ModuleFormat]:
        return dict(self.choices[p] for p in now)

    def moves(self, now: NDArray[np.int64], budget_bytes: int, rows: Tensor, most: int = 200) -> list[tuple[int, ...]]:
        """Changes of one or two modules that should gain, the most promising first."""
        program, own = self.program, now[self.program.unit]
        along = measure_gradients(self.student, self.plan(now), rows).along
        formats = self.student.bank.formats
        gradient = np.array(
            [float(along[name][formats(name).index(form)]) if name in along else 0.0 for name, form in self.choices]
        )
        gain = gradient - gradient[own] + _CURVATURE * self._curvature(own)
        cost = program.nbytes - program.nbytes[own]
        pairs = gain[:, None] + gain[None, :] + 2 * _CURVATURE * _cross(program.pairs, own)
        pairs[np.arange(len(own)), np.arange(len(own))] = gain
        over = cost[:, None] + cost[None, :] > budget_bytes - program.nbytes[now].sum()
        same = program.unit[:, None] == program.unit[None, :]
        np.fill_diagonal(over, cost > budget_bytes - program.nbytes[now].sum())
        np.fill_diagonal(same, False)
        idle = np.arange(len(own)) == own
        pairs[over | same | idle[:, None] | idle[None, :]] = np.inf
        upper = np.triu_indices(len(own))
        order = np.argsort(pairs[upper])[:most]
        return [
            (int(a),) if a == b else (int(a), int(b))
            for a, b in zip(upper[0][order], upper[1][order], strict=True)
            if pairs[a, b] < 0
        ]

    def _curvature(self, own: NDArray[np.int64]) -> NDArray[np.float64]:
        """Loss of the difference of each choice from the present one of its module, in the Fisher metric."""
        linear, within = self.program.linear, self.program.within
        curvature: NDArray[np.float64] = linear + linear[own] - 2 * within[np.arange(len(own)), own]
        return np.maximum(curvature, 0)


def _cross(pairs: NDArray[np.float64], own: NDArray[np.int64]) -> NDArray[np.float64]:
    crossed: NDArray[np.float64] = pairs - pairs[:, own] - pairs[own, :] + pairs[np.ix_(own, own)]
    return crossed


def below_zero(differences: Tensor) -> bool:
    error = float(differences.std()) / len(differences) ** 0.5
    return bool(float(differences.mean()) < -_ERRORS * error)
