"""GAMMA learned anew for one budget: the scores are corrected in the company of the plan that they gave for it."""

from dataclasses import replace

import numpy as np
import torch

from allocator.contract.scores import Scores
from allocator.evaluate import measure_gradients
from allocator.solve.quadratic import local_search, quadratic_of
from allocator.solve.units import NO_RULES, units_of
from benchmarks.allocation.laboratory import Laboratory

__all__ = ["relearn"]

SHARE = 0.5
"""Of what the gradients say beyond the scores, how much is believed: all of it overshoots, on calibration text too."""


def relearn(lab: Laboratory, scores: Scores, plan: list[int], bits: float) -> list[int]:
    """The plan of scores that agree, at `plan`, with the measured gradient of the KL along every candidate.

    To the quadratic of the scores, scaled to the KL measured at `plan`, half the difference between the measured and
    its own gradient is added as a linear term; then it is solved again, from `plan`.
    """
    alone = lab.linears_only(scores)
    program = quadratic_of(alone, units_of(alone, NO_RULES, "free"))
    names = sorted(lab.names)
    width = {name: lab.widths.index(b) for name, b in zip(lab.names, plan, strict=True)}
    now = np.array([u * len(lab.widths) + width[name] for u, name in enumerate(names)])
    gradients = measure_gradients(lab.calibration, lab.assignment(plan))
    along = torch.cat([gradients.along[name] for name in names]).numpy()
    scale = float(gradients.losses.kl.mean()) / program.value(now)
    own = now[program.unit]
    predicted = 2 * scale * (program.within[np.arange(len(own)), own] + program.pairs[:, now].sum(1))
    beyond = (along - along[own]) - (predicted - predicted[own])
    corrected = replace(program, linear=scale * program.linear + SHARE * beyond, pairs=scale * program.pairs)
    found = local_search(corrected, [int(p) for p in now], lab.budget(bits))
    by_name = {name: lab.widths[p % len(lab.widths)] for name, p in zip(names, found, strict=True)}
    return [by_name[name] for name in lab.names]
