"""Gradients of the model's own log-likelihood at the output of every block, computed one block at a time."""

from collections.abc import Sequence

import torch

from allocator.blocks.hidden import HiddenStates
from allocator.blocks.stream import BlockStream, batches
from allocator.progress import Progress, silent

__all__ = ["fill_gradients"]

_HEAD_TOKENS = 512


def fill_gradients(
    stream: BlockStream,
    hidden: HiddenStates,
    gradients: Sequence[HiddenStates],
    seed: int,
    progress: Progress = silent,
) -> None:
    """Fill boundary i of each of `gradients` with the gradient at the states before block i, i = 1 .. blocks.

    Each of them is one draw: at every position a token y is drawn from the model's distribution, and the gradient is
    that of the sum of -log p(y). `hidden` holds the teacher's states. Boundary 0 is not filled.
    """
    _fill_last(stream, hidden, gradients, seed)
    for index in range(stream.blocks - 1, 0, -1):
        progress("gradients", 1 - (index + 1) / stream.blocks)
        block = stream.block(index)
        before = hidden.boundary(index)
        upstream = [g.boundary(index + 1) for g in gradients]
        downstream = [g.boundary(index) for g in gradients]
        for rows in batches(before):
            states = before[rows].to(stream.device).requires_grad_(True)
            output = stream.run(block, states)
            for above, below in zip(upstream, downstream, strict=True):
                (gradient,) = torch.autograd.grad(output, states, above[rows].to(stream.device), retain_graph=True)
                below[rows] = gradient.cpu()
    progress("gradients", 1.0)


def _fill_last(stream: BlockStream, hidden: HiddenStates, gradients: Sequence[HiddenStates], seed: int) -> None:
    head = stream.head()
    # Drawn on the CPU, so that every device sees the same tokens.
    generator = torch.Generator().manual_seed(seed)
    last = hidden.boundary(stream.blocks).flatten(0, 1)
    targets = [g.boundary(stream.blocks).flatten(0, 1) for g in gradients]
    for start in range(0, last.shape[0], _HEAD_TOKENS):
        rows = slice(start, start + _HEAD_TOKENS)
        states = last[rows].to(stream.device).requires_grad_(True)
        logprobs = head(states).log_softmax(-1)
        probabilities = logprobs.detach().exp().cpu()
        for target in targets:
            drawn = torch.multinomial(probabilities, 1, generator=generator).to(stream.device)
            loss = -logprobs.gather(-1, drawn).sum()
            (gradient,) = torch.autograd.grad(loss, states, retain_graph=True)
            target[rows] = gradient.cpu()
