"""Gradients of the model's log-probabilities at the output of every block, computed one block at a time."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from allocator.blocks.backward import BlockBackward
from allocator.blocks.finite import require_finite
from allocator.blocks.hidden_states import HiddenStates
from allocator.blocks.products import linear
from allocator.blocks.stream import BlockStream, batches
from allocator.contract.digest import digest_bytes
from allocator.run.journal import Journal
from allocator.run.process_group import ProcessGroup
from allocator.run.progress import Progress, silent

__all__ = [
    "GRADIENTS_STEP",
    "backward_by_block",
    "dealt",
    "draw_signs",
    "fill_gradients",
    "finish_boundary",
    "keep_gradient",
    "parts_of_sequence",
    "random_signs",
    "rows_together",
]

GRADIENTS_STEP = "gradients of predictions"

_HEAD_TOKENS, _HEAD_ROWS = 512, 4096


def backward_by_block(
    stream: BlockStream,
    hidden: HiddenStates,
    gradients: Sequence[HiddenStates],
    seed: int,
    journal: Journal | None = None,
    to_embedding: bool = False,
    progress: Progress = silent,
    three_digits: bool = False,
) -> Iterator[int]:
    """Yield the numbers of all blocks from the last to the first, each when the gradients at its output are there.

    At every position each token y of the vocabulary gets a random sign x_y, and is dealt to one of the S probes, which
    `gradients` are of. Theirs is the gradient of the sum of x_y sqrt(S p_y) log p_y over their tokens, with sqrt(p_y)
    held fixed. Signs are independent, so the mean of its products over the probes has the expectation of those of the
    gradients of log p_y, y drawn from the model: the Fisher matrix; with less noise (Hutchinson 1990), and as much as
    S probes of all tokens each would have, at S times the arithmetic. A model that predicts nothing has another answer
    to be right: see `_gradients_of_directions`.

    `hidden` holds the teacher's states. The gradients at the output of block i are boundary i + 1; only they and those
    one block on are on the disk at a time, so what is to be learned of a block must be learned, and kept in `journal`,
    before the next number is asked for. Boundaries that `journal` has are not computed again. With `to_embedding`, -1
    comes after block 0, when the gradients at the embedding's output are there.
    What is computed before the first number is a step of `progress`. `three_digits`: see `BlockBackward`.
    """
    journal = journal or Journal.nowhere()
    for index in range(stream.blocks, -1 if to_embedding else 0, -1):
        _fill_boundary(stream, hidden, gradients, seed, index, journal, progress, three_digits)
        if journal.process_group.leads:
            for store in gradients:
                store.forget(index + 1)
        yield index - 1


def fill_gradients(stream: BlockStream, hidden: HiddenStates, gradients: Sequence[HiddenStates], seed: int) -> None:
    """Fill all boundaries 1 .. blocks of each of `gradients` (see `backward_by_block`)."""
    for index in range(stream.blocks, 0, -1):
        _fill_boundary(stream, hidden, gradients, seed, index, Journal.nowhere(), silent)


def parts_of_sequence(length: int) -> list[slice]:
    """The tokens of a sequence in parts that meet the lm_head together."""
    return [slice(start, min(start + _HEAD_TOKENS, length)) for start in range(0, length, _HEAD_TOKENS)]


def rows_together(vocabulary: int) -> list[slice]:
    """The vocabulary in stripes whose signs are drawn together."""
    return [slice(start, min(start + _HEAD_ROWS, vocabulary)) for start in range(0, vocabulary, _HEAD_ROWS)]


def random_signs(seed: int, sequence: int, part: slice, rows: slice) -> Tensor:
    """The signs of one of `rows_together` at one of `parts_of_sequence`: int8 `[tokens, rows]`.

    Drawn on the CPU, each stripe by itself, so that every device and every number of processes sees the same signs, and
    what is learned of the lm_head can have those of any stripe again.
    """
    key = digest_bytes(f"{seed} {sequence} {part.start} {rows.start}".encode())
    generator = torch.Generator().manual_seed(int(key[-8:], 16))
    shape = (part.stop - part.start, rows.stop - rows.start)
    return 2 * torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) - 1


def dealt(tensor: Tensor, probes: int, dim: int) -> Tensor:
    """A stripe of the vocabulary along `dim`, as it is dealt to the probes one by one: `[probes, ...]` with a share of
    it in the place of `dim`, the last ones filled up with zeros."""
    missing = -tensor.shape[dim] % probes
    if missing:
        shape = [*tensor.shape]
        shape[dim] = missing
        tensor = torch.cat([tensor, tensor.new_zeros(shape)], dim)
    shape = [*tensor.shape[:dim], -1, probes, *tensor.shape[dim + 1 :]]
    return tensor.view(shape).movedim(dim + 1, 0)


def draw_signs(seed: int, wanted: Sequence[tuple[int, slice, slice]]) -> list[Tensor]:
    """`random_signs` of each of `wanted` (sequence, part, rows), drawn on as many cores as torch has threads: of a
    large vocabulary there are billions."""
    if len(wanted) == 1 or torch.get_num_threads() == 1:
        return [random_signs(seed, *one) for one in wanted]
    return list(_drawers(torch.get_num_threads()).map(lambda one: random_signs(seed, *one), wanted))


@cache
def _drawers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "random_signs")


def _fill_boundary(
    stream: BlockStream,
    hidden: HiddenStates,
    gradients: Sequence[HiddenStates],
    seed: int,
    index: int,
    journal: Journal,
    progress: Progress,
    three_digits: bool = False,
) -> None:
    if journal.load(_step(index)) is not None:
        return
    if index == stream.blocks:
        _fill_last(stream, hidden, gradients, seed, journal.process_group, progress)
    else:
        _fill_before(stream, hidden, gradients, index, journal.process_group, three_digits)
    finish_boundary(gradients, index, journal)


def _fill_before(
    stream: BlockStream,
    hidden: HiddenStates,
    gradients: Sequence[HiddenStates],
    index: int,
    process_group: ProcessGroup,
    three_digits: bool,
) -> None:
    """From the gradients after block `index` to those before it."""
    block = stream.block(index)
    for _, rows in process_group.share(batches(hidden.shape)):
        states = hidden.boundary(index)[rows].to(stream.device)
        backward = BlockBackward(stream, block, states, three_digits=three_digits)
        for store in gradients:
            above = store.boundary(index + 1)[rows].to(stream.device).float()
            keep_gradient(store, index, rows, backward.pull(above, store is gradients[-1]).at_states)


def keep_gradient(store: HiddenStates, index: int, rows: slice | Tensor, gradient: Tensor) -> None:
    """Put a probe's gradient at boundary `index`, `[B, T, D]`, into its store: that of the sequences `rows`."""
    store.boundary(index)[rows] = gradient.to(store.dtype).cpu()


def finish_boundary(gradients: Sequence[HiddenStates], index: int, journal: Journal, may_stop: bool = True) -> None:
    """Tell `journal` that all processes have filled boundary `index`, once it is on the disk (`may_stop` as in
    `Journal.save`)."""
    journal.process_group.wait()
    if journal.process_group.leads:
        for store in gradients:
            store.settle(index)
    journal.save(_step(index), True, may_stop)


def _step(index: int) -> str:
    return f"gradients-{index:04d}"


def _fill_last(
    stream: BlockStream,
    hidden: HiddenStates,
    gradients: Sequence[HiddenStates],
    seed: int,
    process_group: ProcessGroup,
    progress: Progress,
) -> None:
    directions = stream.inventory.shape.head == "states"
    norm, weight = stream.norm(), torch.empty(0) if directions else stream.head_weight()
    for sequence, row in progress.over(process_group.share(range(hidden.shape[0])), GRADIENTS_STEP, "sequence"):
        for part in parts_of_sequence(hidden.shape[1]):
            states = hidden.boundary(stream.blocks)[row, part].to(stream.device).requires_grad_(True)
            normed = norm(states)
            with torch.no_grad():
                if directions:
                    above = _gradients_of_directions(normed, len(gradients), seed, sequence, part)
                else:
                    above = _gradients_of_head(normed, weight, stream.softcap, len(gradients), seed, sequence, part)
            for store, of_probe in zip(gradients, above, strict=True):
                (gradient,) = torch.autograd.grad(normed, states, of_probe, retain_graph=store is not gradients[-1])
                require_finite(gradient, "gradients at the input of the final norm")
                store.boundary(stream.blocks)[row, part] = gradient.to(store.dtype).cpu()


def _gradients_of_head(
    states: Tensor, weight: Tensor, softcap: float | None, probes: int, seed: int, sequence: int, part: slice
) -> Tensor:
    """The gradients of the probes at the input of the lm_head, `states` `[T, D]`: `[S, T, D]`.

    Those by the logits are r_y - p_y sum_z r_z, r_y being x_y sqrt(S p_y). The second term has one product with the
    weight for all probes, and the first one too: each token is of one probe.
    """
    logits = linear(states, weight)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    normaliser = logits.logsumexp(-1, keepdim=True)
    signed, mean = states.new_zeros(probes, *states.shape), torch.zeros_like(states)
    roots = states.new_zeros(probes, len(states))
    for rows in rows_together(len(weight)):
        of_rows, capped = weight[rows], logits[:, rows]
        slope = None if softcap is None else 1 - (capped / softcap).square_()
        root = ((capped - normaliser) / 2).exp_()
        probability = root.square()
        root *= random_signs(seed, sequence, part, rows).to(root.device)
        roots += dealt(root, probes, 1).sum(-1)
        if slope is not None:
            root *= slope
            probability *= slope
        mean += linear(probability, of_rows.T)
        for total, own, theirs in zip(signed, dealt(root, probes, 1), dealt(of_rows, probes, 0), strict=True):
            total += linear(own.contiguous(), theirs.T)
    return (signed - roots.unsqueeze(-1) * mean) * math.sqrt(probes)


def _gradients_of_directions(states: Tensor, probes: int, seed: int, sequence: int, part: slice) -> Tensor:
    """Of an embedding model, whose answer is the direction u of the last token's state h, `[S, T, D]`: random signs
    across u, over |h|. An error e turns u by what is across it, so that the mean of (g . e)^2 / 2 is, to second order,
    1 - cos(h, h + e): every token may be the last one. states: `[T, D]`, of the final norm."""
    length = states.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    direction = states / length
    width = states.shape[-1]
    drawn = [random_signs(seed, sequence, part, slice(n * width, (n + 1) * width)) for n in range(probes)]
    signs = torch.stack(drawn).to(states)
    across: Tensor = (signs - (signs * direction).sum(-1, keepdim=True) * direction) / length
    return across
