"""Gradients of the model's log-probabilities at the output of every block, computed one block at a time."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from allocator.blocks.finite import require_finite
from allocator.blocks.hidden_states import HiddenStates
from allocator.blocks.stream import BlockStream, batches
from allocator.contract.digest import digest_bytes
from allocator.run.journal import Journal
from allocator.run.process_group import ProcessGroup
from allocator.run.progress import Progress, silent

__all__ = [
    "GRADIENTS_STEP",
    "backward_by_block",
    "draw_signs",
    "fill_gradients",
    "parts_of_sequence",
    "rademacher_probe",
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
) -> Iterator[int]:
    """Yield the numbers of all blocks from the last to the first, each when the gradients at its output are there.

    Each of `gradients` is of one probe: at every position each token y of the vocabulary gets a random sign x_y, and
    the gradient is that of the sum of x_y sqrt(p_y) log p_y, with sqrt(p_y) held fixed. Signs are independent, so its
    products have the mean that those of the gradients of log p_y have, y drawn from the model: the Fisher matrix; with
    less noise (Hutchinson 1990). `hidden` holds the teacher's states. The gradients at the output of block i
    are boundary i + 1; only they and those one block on are on the disk at a time, so what is to be learned of a block
    must be learned, and kept in `journal`, before the next number is asked for. Boundaries that `journal` has are not
    computed again. With `to_embedding`, -1 comes after block 0, when the gradients at the embedding's output are there.
    What is computed before the first number is a step of `progress`.
    """
    journal = journal or Journal.nowhere()
    for index in range(stream.blocks, -1 if to_embedding else 0, -1):
        _fill_boundary(stream, hidden, gradients, seed, index, journal, progress)
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


def rademacher_probe(seed: int, probe: int, sequence: int, part: slice, rows: slice) -> Tensor:
    """The random signs of a probe, at one of `parts_of_sequence` and for one of `rows_together`: int8 `[tokens, rows]`.

    Drawn on the CPU, each stripe by itself, so that every device and every number of processes sees the same signs, and
    what is learned of the lm_head can have those of any stripe again.
    """
    key = digest_bytes(f"{seed} {probe} {sequence} {part.start} {rows.start}".encode())
    generator = torch.Generator().manual_seed(int(key[-8:], 16))
    shape = (part.stop - part.start, rows.stop - rows.start)
    return 2 * torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) - 1


def draw_signs(seed: int, wanted: Sequence[tuple[int, int, slice, slice]]) -> list[Tensor]:
    """`rademacher_probe` of each of `wanted` (probe, sequence, part, rows), drawn on as many cores as torch has
    threads: of a large vocabulary there are billions, and one core would take longer than all else."""
    if len(wanted) == 1 or torch.get_num_threads() == 1:
        return [rademacher_probe(seed, *one) for one in wanted]
    return list(_drawers(torch.get_num_threads()).map(lambda one: rademacher_probe(seed, *one), wanted))


@cache
def _drawers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "rademacher_probe")


def _fill_boundary(
    stream: BlockStream,
    hidden: HiddenStates,
    gradients: Sequence[HiddenStates],
    seed: int,
    index: int,
    journal: Journal,
    progress: Progress,
) -> None:
    step = f"gradients-{index:04d}"
    if journal.load(step) is not None:
        return
    if index == stream.blocks:
        _fill_last(stream, hidden, gradients, seed, journal.process_group, progress)
    else:
        _fill_before(stream, hidden, gradients, index, journal.process_group)
    journal.process_group.wait()
    if journal.process_group.leads:
        for store in gradients:
            store.settle(index)
    journal.save(step, True)


def _fill_before(
    stream: BlockStream,
    hidden: HiddenStates,
    gradients: Sequence[HiddenStates],
    index: int,
    process_group: ProcessGroup,
) -> None:
    """From the gradients after block `index` to those before it."""
    block = stream.block(index)
    for _, rows in process_group.share(batches(hidden.shape)):
        states = hidden.boundary(index)[rows].to(stream.device).requires_grad_(True)
        output = stream.run(block, states)
        for store in gradients:
            above = store.boundary(index + 1)[rows].to(stream.device).float()
            (gradient,) = torch.autograd.grad(output, states, above, retain_graph=store is not gradients[-1])
            require_finite(gradient, f"gradients at the input of {stream.inventory.block_prefix(index)[:-1]}")
            store.boundary(index)[rows] = gradient.to(store.dtype).cpu()


def _fill_last(
    stream: BlockStream,
    hidden: HiddenStates,
    gradients: Sequence[HiddenStates],
    seed: int,
    process_group: ProcessGroup,
    progress: Progress,
) -> None:
    head = stream.head()
    for sequence, row in progress.over(process_group.share(range(hidden.shape[0])), GRADIENTS_STEP, "sequence"):
        for part in parts_of_sequence(hidden.shape[1]):
            states = hidden.boundary(stream.blocks)[row, part].to(stream.device).requires_grad_(True)
            logprobs = head(states).log_softmax(-1)
            root = (logprobs.detach() / 2).exp()
            for probe, store in enumerate(gradients):
                stripes = rows_together(logprobs.shape[1])
                drawn = torch.cat(draw_signs(seed, [(probe, sequence, part, rows) for rows in stripes]), 1)
                weights = drawn.to(stream.device) * root
                (gradient,) = torch.autograd.grad(logprobs, states, weights, retain_graph=store is not gradients[-1])
                require_finite(gradient, "gradients at the input of the final norm")
                store.boundary(stream.blocks)[row, part] = gradient.to(store.dtype).cpu()
