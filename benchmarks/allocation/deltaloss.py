"""`deltaloss`: the score of AutoRound's AutoScheme (SignRoundV2, arXiv 2512.04746).

For each width the whole model is set to it, and the gradient G of the text's loss is read there; the score of a module
at that width is the sum over its weights, and over batches of text, of |G (W - Q_b)|. The gradient is read with what
stands outside the blocks at 16 bits, which is where AutoRound leaves the lm_head unless it is told otherwise.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from allocator.blocks.stream import HEAD_WEIGHT
from allocator.contract.layout import ModuleFormat
from allocator.evaluate import Student
from allocator.quantize.candidates import Candidates
from allocator.score.methods import Task
from allocator.score.tables import Table

__all__ = ["learn_deltaloss"]


def learn_deltaloss(task: Task) -> Table:
    """Nats a token of loss of the text, to first order, signs ignored."""
    student = Student.of_teacher(task.stream, task.bank, task.hidden, task.token_ids)
    widths = sorted({f.num_bits for module in task.bank.bank.modules.values() for f in module.candidates})
    scores = {name: torch.zeros(len(task.bank.formats(name)), dtype=torch.float64) for name in task.bank.bank.modules}
    batches = torch.split(
        torch.arange(task.hidden.shape[0]), max(1, task.settings.batch_tokens // task.hidden.shape[1])
    )
    for bits in task.progress.over(widths, "measuring", "width"):
        found = task.once(f"deltaloss-{bits}", partial(_at, task, student, bits, batches))
        for name, value in found.items():
            number = [f.num_bits for f in task.bank.formats(name)].index(bits)
            scores[name][number] = value
    return Table(scores, "nats of the text's loss a token, to first order, signs ignored")


def _at(task: Task, student: Student, bits: int, batches: Sequence[Tensor]) -> dict[str, float]:
    """By module with a candidate of `bits` bits its score."""
    at_width = {
        name: form for name in task.bank.bank.modules for form in task.bank.formats(name) if form.num_bits == bits
    }
    totals = dict.fromkeys(at_width, 0.0)
    for rows in batches:
        for name, (gradient, change) in _slopes(student, at_width, rows).items():
            totals[name] += float((gradient * change).abs().sum(dtype=torch.float64)) * len(rows)
    return {name: total / task.hidden.shape[0] for name, total in totals.items()}


def _slopes(student: Student, at_width: Mapping[str, ModuleFormat], rows: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By module of `at_width` the gradient G `[N, K]` of the loss of the sequences `rows`, and W - Q.

    The model is whole in memory.
    """
    stream, vocabulary, ids = student.stream, student.vocabulary, student.token_ids[rows]
    weights = {name: vocabulary.source(name).clone().requires_grad_(True) for name in vocabulary.formats}
    changes = {name: _change(vocabulary, name, at_width[name]) for name in weights if name in at_width}
    states = stream.embed(ids, weights.get(vocabulary.embedding))
    for index in range(stream.blocks):
        block, candidates = student.block(index)
        here = {p: w.clone().requires_grad_(True) for p, w in student.weights(index, at_width).items()}
        states = stream.run(block, states, here)
        for local, name in student.local_names(index).items():
            if name in at_width:
                weights[name], changes[name] = here[f"{local}.weight"], _change(candidates, local, at_width[name])
    head = weights.get(vocabulary.head)
    logits = functional_call(stream.head(), {} if head is None else {HEAD_WEIGHT: head}, (states[:, :-1],))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(logits.device))
    gradients = torch.autograd.grad(loss, [weights[name] for name in changes])
    return {name: (gradient, change) for (name, change), gradient in zip(changes.items(), gradients, strict=True)}


def _change(candidates: Candidates, name: str, form: ModuleFormat) -> Tensor:
    return candidates.source(name) - candidates.weight(name, candidates.formats[name].index(form))
