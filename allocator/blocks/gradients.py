"""Gradients of the model's own log-likelihood at the output of every block, computed one block at a time."""

from collections.abc import Sequence

import torch

from allocator.blocks.hidden import HiddenStates
from allocator.blocks.stream import BlockStream, batches
from allocator.progress import Progress, silent
from allocator.running import Journal, Team

__all__ = ["fill_gradients"]

_HEAD_TOKENS = 512


def fill_gradients(
    stream: BlockStream,
    hidden: HiddenStates,
    gradients: Sequence[HiddenStates],
    seed: int,
    progress: Progress = silent,
    journal: Journal | None = None,
) -> None:
    """Fill boundary i of each of `gradients` with the gradient at the states before block i, i = 1 .. blocks.

    Each of them is one draw: at every position a token y is drawn from the model's distribution, and the gradient is
    that of the sum of -log p(y). `hidden` holds the teacher's states. Boundary 0 is not filled. Boundaries that
    `journal` has are taken as they are.
    """
    journal = journal or Journal.nowhere()
    for index in range(stream.blocks, 0, -1):
        progress("gradients", 1 - index / stream.blocks)
        step = f"gradients-{index:04d}"
        if journal.load(step) is None:
            if index == stream.blocks:
                _fill_last(stream, hidden, gradients, seed, journal.team)
            else:
                _fill_before(stream, hidden, gradients, index, journal.team)
            journal.team.wait()
            if journal.team.leads:
                for store in gradients:
                    store.settle(index)
            journal.save(step, True)
    progress("gradients", 1.0)


def _fill_before(
    stream: BlockStream, hidden: HiddenStates, gradients: Sequence[HiddenStates], index: int, team: Team
) -> None:
    """From the gradients after block `index` to those before it."""
    block = stream.block(index)
    for _, rows in team.share(batches(hidden.shape)):
        states = hidden.boundary(index)[rows].to(stream.device).requires_grad_(True)
        output = stream.run(block, states)
        for store in gradients:
            above = store.boundary(index + 1)[rows].to(stream.device).float()
            (gradient,) = torch.autograd.grad(output, states, above, retain_graph=store is not gradients[-1])
            store.boundary(index)[rows] = gradient.to(store.dtype).cpu()


def _fill_last(
    stream: BlockStream, hidden: HiddenStates, gradients: Sequence[HiddenStates], seed: int, team: Team
) -> None:
    head = stream.head()
    for sequence, row in team.share(range(hidden.shape[0])):
        # Drawn on the CPU and by sequence, so that every device and every number of processes sees the same tokens.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + sequence)
        for start in range(0, hidden.shape[1], _HEAD_TOKENS):
            part = slice(start, start + _HEAD_TOKENS)
            states = hidden.boundary(stream.blocks)[row, part].to(stream.device).requires_grad_(True)
            logprobs = head(states).log_softmax(-1)
            probabilities = logprobs.detach().exp().cpu()
            for store in gradients:
                drawn = torch.multinomial(probabilities, 1, generator=generator).to(stream.device)
                loss = -logprobs.gather(-1, drawn).sum()
                (gradient,) = torch.autograd.grad(loss, states, retain_graph=store is not gradients[-1])
                store.boundary(stream.blocks)[row, part] = gradient.to(store.dtype).cpu()
