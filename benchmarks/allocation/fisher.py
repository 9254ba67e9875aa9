"""`fisher`: the gradient score of NVIDIA ModelOpt's AutoQuantize, with the Fisher information's diagonal.

A module's output o changes by d when a candidate is swapped in; its score is the sum over tokens and outputs of
(g d)^2, g being the gradient of the model's loss by o. Outputs are taken one by one, so neither what they do together
nor what the block makes of them counts. One backward pass and a product a candidate: the cheapest measured score.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from allocator.score.methods import Task
from allocator.score.tables import Table
from allocator.score.teacher import Teacher

__all__ = ["learn_fisher"]


def learn_fisher(task: Task) -> Table:
    """Half the mean over tokens of the sum of (g d)^2, in nats if outputs did nothing together."""
    scores: dict[str, Tensor] = {}
    for index, teacher in task.backward_by_block("measuring", vocabulary=True):
        if index < 0:
            scores |= task.once("fisher-vocabulary", partial(_measure_vocabulary, task, teacher))
            continue
        found = task.once(f"fisher-{index:04d}", partial(_measure_block, task, teacher, index))
        scores |= {task.module(index, local): values for local, values in found.items()}
    return Table(task.in_model_order(scores), "nats a token, to second order, outputs taken one by one")


def _measure_vocabulary(task: Task, teacher: Teacher) -> dict[str, Tensor]:
    """The rows of an embedding and the logits are outputs like others; one module for both has those of both.

    The mean of g^2 over all draws is p (1 - p) of a logit. The whole vocabulary is in memory.
    """
    candidates, draws = task.vocabulary(), len(teacher.gradients)
    norm, softcap = task.stream.norm(), task.stream.softcap
    totals = {name: torch.zeros(len(formats), dtype=torch.float64) for name, formats in candidates.formats.items()}
    with torch.inference_mode():
        for rows in teacher.partition(task.settings.batch_tokens):
            ids, last = task.token_ids[rows], task.hidden.boundary(task.stream.blocks)[rows]
            states = norm(last.to(task.stream.device))
            for name, formats in candidates.formats.items():
                source = candidates.source(name)
                steps = [candidates.weight(name, i) - source for i in range(len(formats) - 1)]
                if name == candidates.embedding:
                    gradients = teacher.gradients_at(task.stream, 0, rows)
                    squares = [(gradients * task.stream.embed(ids, step)).square() for step in steps]
                    totals[name][:-1] += torch.stack([s.sum(dtype=torch.float64) for s in squares]).cpu()
                if name == candidates.head:
                    logits, gradient = states @ source.T, 1.0
                    if softcap is not None:
                        logits = softcap * torch.tanh(logits / softcap)
                        gradient = 1 - (logits / softcap).square()
                    p = logits.softmax(-1)
                    squares = [p * (1 - p) * (gradient * (states @ step.T)).square() for step in steps]
                    totals[name][:-1] += draws * torch.stack([s.sum(dtype=torch.float64) for s in squares]).cpu()
    return {name: total / (2 * task.token_ids.numel() * draws) for name, total in totals.items()}


def _measure_block(task: Task, teacher: Teacher, index: int) -> dict[str, Tensor]:
    block = task.stream.block(index)
    candidates = task.candidates(index, block)
    partition = teacher.partition(task.settings.batch_tokens)
    mine: dict[int, dict[str, Tensor]] = {}
    for number, rows in task.journal.process_group.share(partition):
        batch = teacher.batch(task.stream, index, rows)
        seen, output = _run_recorded(task, block, list(candidates.formats), batch.states)
        totals = {local: torch.zeros(len(f), dtype=torch.float64) for local, f in candidates.formats.items()}
        for draw in batch.gradients:
            gradients = torch.autograd.grad(output, [seen[local][1] for local in totals], draw, retain_graph=True)
            for local, gradient in zip(totals, gradients, strict=True):
                for i in range(len(candidates.formats[local]) - 1):
                    step = candidates.weight(local, i) - candidates.source(local)
                    change = nn.functional.linear(seen[local][0], step)
                    totals[local][i] += float((gradient * change).square().sum(dtype=torch.float64))
        mine[number] = totals
    together = task.journal.process_group.gather(mine)
    samples = 2 * task.hidden.shape[0] * task.hidden.shape[1] * len(teacher.gradients)
    return {local: torch.stack([part[local] for part in together]).sum(0) / samples for local in candidates.formats}


def _run_recorded(
    task: Task, block: nn.Module, names: list[str], states: Tensor
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Input and output of each named module, and the block's output, with a graph from the modules' outputs on."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[name] = inputs[0].detach(), output

        return hook

    hooks = [block.get_submodule(name).register_forward_hook(record(name)) for name in names]
    try:
        output = task.stream.run(block, states.clone().requires_grad_(True))
    finally:
        for handle in hooks:
            handle.remove()
    return seen, output
