"""Rivals that this package does not ship, as their papers describe them, on the same candidates and exact bytes.

`gradient_search` is of the class of RCO (arXiv 2605.00649), `evolutionary_search` of EvoPress (arXiv 2410.14649).
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from allocator.evaluate import measure_gradients
from benchmarks.allocation.laboratory import Laboratory

__all__ = ["evolutionary_search", "gradient_search", "head_and_tail"]


def head_and_tail(lab: Laboratory, bits: float) -> list[int]:
    """The first and last quarter of the blocks first get the wider of the two widths around the budget.

    From the largest uniform plan, whole blocks are raised by one width in the order first, last, second, second last.
    """
    budget = lab.budget(bits)
    plan = lab.uniform(bits)
    blocks = sorted({lab.block_of(name) for name in lab.names})
    order = [b for pair in zip(blocks, reversed(blocks), strict=True) for b in pair][: len(blocks)]
    for block in order:
        for position, name in enumerate(lab.names):
            if lab.block_of(name) == block:
                raised = list(plan)
                raised[position] = lab.widths[lab.widths.index(plan[position]) + 1]
                if lab.nbytes(raised) <= budget:
                    plan = raised
    return plan


def gradient_search(
    lab: Laboratory,
    bits: float,
    seconds: float,
    sequences: int,
    learning_rate: float = 0.1,
    first_temperature: float = 1.0,
    last_temperature: float = 0.01,
    seed: int = 0,
) -> list[int]:
    """Logits on the manifold of equal expected bytes, moved by straight-through gradients of the final KL.

    Each step draws Gumbel noise, takes the best assignment within the budget for the noisy logits, reads the gradient
    of the KL along every candidate, removes its component along the budget's normal, takes an Adam step and shifts the
    logits back onto the manifold; the temperature falls exponentially. Logits start from -log of the weight error.
    The last assignment is the exact program over log probabilities, at the whole budget. Takes `seconds` of CPU time:
    the temperature falls by the share of them that is gone.
    """
    begun = time.process_time()
    generator = torch.Generator().manual_seed(seed)
    budget = lab.budget(bits)
    parameters = lab.parameters_by_module().unsqueeze(1)
    manifold = _Manifold(8 * lab.bytes / parameters, parameters / parameters.sum(), 8 * budget / lab.parameters)
    logits = -(lab.weight_errors() / parameters + 1e-8).log()
    logits = manifold.retract(logits - logits.mean(1, keepdim=True))
    first, second = torch.zeros_like(logits), torch.zeros_like(logits)
    step = 0
    while (share := (time.process_time() - begun) / seconds) < 1:
        temperature = first_temperature * (last_temperature / first_temperature) ** share
        uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp(1e-20, 1 - 1e-16)
        noisy = (logits - (-uniform.log()).log()) / temperature
        choice = lab.solve(-noisy, bits)
        rows = torch.randperm(lab.calibration.token_ids.shape[0], generator=generator)[:sequences]
        gradients = measure_gradients(lab.calibration, lab.assignment(choice), rows)
        along = torch.stack([gradients.along[name] for name in lab.names])
        soft = torch.softmax(noisy, 1)
        gradient = soft * (along - (soft * along).sum(1, keepdim=True)) / temperature
        gradient = manifold.tangent(gradient, logits)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        unbiased = second / (1 - 0.999 ** (step + 1))
        logits = logits - learning_rate * first / (1 - 0.9 ** (step + 1)) / (unbiased.sqrt() + 1e-8)
        logits = manifold.retract(logits)
        first = manifold.tangent(first, logits)
        step += 1
    return _spending_all(lab, -torch.log_softmax(logits, 1), bits)


def _spending_all(lab: Laboratory, table: Tensor, bits: float) -> list[int]:
    """The exact program at the budget, not below it: with the least reward a byte at which nothing more fits.

    Log probabilities are no losses: where the likeliest widths are narrow ones, the plain program leaves bytes unspent.
    """
    budget = lab.budget(bits)

    def full(plan: list[int]) -> bool:
        return all(
            lab.nbytes([*plan[:i], lab.widths[lab.widths.index(width) + 1], *plan[i + 1 :]]) > budget
            for i, width in enumerate(plan)
            if width < lab.widths[-1]
        )

    if full(plan := lab.solve(table, bits)):
        return plan
    low, high = 0.0, 100.0 / float(lab.bytes.min())
    found = plan
    for _ in range(30):
        middle = (low + high) / 2
        plan = lab.solve(table - middle * lab.bytes, bits)
        if full(plan):
            high, found = middle, plan
        else:
            low = middle
    return found


@dataclass(frozen=True)
class _Manifold:
    """Logits `[modules, widths]` whose expected bits are `target`.

    bits: of each candidate a weight, scales and zero points included `[modules, widths]`; shares: of each module in all
    weights `[modules, 1]`.
    """

    bits: Tensor
    shares: Tensor
    target: float

    def tangent(self, direction: Tensor, logits: Tensor) -> Tensor:
        """`direction` without its component along the manifold's normal."""
        p = torch.softmax(logits, 1)
        normal = self.shares * p * (self.bits - (p * self.bits).sum(1, keepdim=True))
        return direction - (direction * normal).sum() / normal.square().sum().clamp_min(1e-12) * normal

    def retract(self, logits: Tensor) -> Tensor:
        """`logits` shifted along the bits until the manifold is met: one shift a bit for all modules."""
        low, high = -1e4, 1e4
        for _ in range(100):
            middle = (low + high) / 2
            p = torch.softmax(logits + middle * self.bits, 1)
            low, high = (low, middle) if float((self.shares * p * self.bits).sum()) > self.target else (middle, high)
        return logits + low * self.bits


def evolutionary_search(
    lab: Laboratory,
    bits: float,
    seconds: float,
    offspring: int = 16,
    survivors: Sequence[int] = (4, 2, 1),
    sequences: Sequence[int] = (1, 4, 16),
    seed: int = 0,
) -> list[int]:
    """Level switches of modules at equal bytes; the fittest of each generation, on more and more text, is the parent.

    Starts from the best of 16 random plans of the budget. An offspring is 1 to 3 raised modules (few more often) and as
    many lowered ones as the budget demands, what is left being spent again. Takes `seconds` of CPU time.
    """
    begun = time.process_time()
    chance = random.Random(seed)
    budget = lab.budget(bits)
    everyone = lab.calibration.token_ids.shape[0]

    def fittest(plans: list[list[int]], keep: int, on: int) -> list[list[int]]:
        rows = torch.tensor(chance.sample(range(everyone), min(on, everyone)))
        return sorted(plans, key=lambda p: float(lab.calibration.losses(lab.assignment(p), rows=rows).kl.mean()))[:keep]

    def lower(plan: list[int]) -> list[int]:
        plan = list(plan)
        while lab.nbytes(plan) > budget:
            able = [i for i, width in enumerate(plan) if width > lab.widths[0]]
            i = chance.choice(able)
            plan[i] = lab.widths[lab.widths.index(plan[i]) - 1]
        return plan

    def raise_where_it_fits(plan: list[int]) -> list[int]:
        order = list(range(len(plan)))
        chance.shuffle(order)
        for i in order:
            if plan[i] < lab.widths[-1]:
                raised = [*plan[:i], lab.widths[lab.widths.index(plan[i]) + 1], *plan[i + 1 :]]
                if lab.nbytes(raised) <= budget:
                    plan = raised
        return plan

    def mutate(parent: list[int]) -> list[int]:
        for _ in range(1000):
            plan = list(parent)
            flips = min(chance.randint(1, 3), chance.randint(1, 3))
            for _ in range(flips):
                able = [i for i, width in enumerate(plan) if width < lab.widths[-1]]
                i = chance.choice(able)
                plan[i] = lab.widths[lab.widths.index(plan[i]) + 1]
            plan = raise_where_it_fits(lower(plan))
            if plan != parent:
                return plan
        raise RuntimeError(f"no other plan of {budget} bytes was found in 1000 mutations of {parent}")

    wide = next(b for b in lab.widths if lab.nbytes([b] * len(lab.names)) > budget)
    plans = [raise_where_it_fits(lower([wide] * len(lab.names))) for _ in range(16)]
    (parent,) = fittest(plans, 1, sequences[1])
    while time.process_time() - begun < seconds:
        plans = [mutate(parent) for _ in range(offspring)]
        for keep, on in zip(survivors, sequences, strict=True):
            if keep == survivors[-1]:
                plans.append(parent)
            plans = fittest(plans, keep, on)
        parent = plans[0]
    return parent
