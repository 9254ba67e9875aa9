"""What quantizers are told of a module: second moments of its inputs, summed over calibration text in float64."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from allocator.blocks.gradients import backward_by_block
from allocator.blocks.hidden_states import HiddenStates
from allocator.blocks.products import linear
from allocator.blocks.stream import BlockStream, batches
from allocator.model import Module
from allocator.quantize.quantizer import InputStatistics, Statistics
from allocator.run.journal import Journal
from allocator.run.process_group import ProcessGroup
from allocator.run.progress import Progress, silent

__all__ = [
    "EMBEDDING_STEP",
    "MomentSums",
    "embedding_gradients",
    "vocabulary_moments",
]

_CHUNK = 2048


class MomentSums:
    """Sums of x x^T (or only of its diagonal) over inputs x of K features.

    Of the matrix only the upper triangle is summed, in stripes of `_CHUNK` rows: products in float32, sums in float64.
    """

    def __init__(self, features: int, kind: Statistics, device: torch.device) -> None:
        shape = (features, features) if kind == "hessian" else (features,)
        self._sum = torch.zeros(shape, dtype=torch.float64, device=device)
        self._tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs `[..., K]`."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self._tokens += rows.shape[0]
        if self._sum.dim() == 1:
            self._sum += rows.double().square().sum(0)
            return
        with torch.no_grad():
            for start in range(0, rows.shape[1], _CHUNK):
                stripe = rows[:, start : start + _CHUNK]
                self._sum[start : start + _CHUNK, start:] += linear(stripe.T, rows[:, start:].T)

    def finish(self, process_group: ProcessGroup) -> InputStatistics:
        """The statistics over the inputs of all processes. Once: the sums are let go."""
        tokens = torch.tensor(self._tokens, dtype=torch.float64, device=self._sum.device)
        process_group.add_up(tokens)
        process_group.add_up(self._sum)
        if self._sum.dim() == 1:
            return InputStatistics(tokens=int(tokens), hessian=None, diagonal=self._sum.float())
        hessian = torch.empty(self._sum.shape, dtype=torch.float32, device=self._sum.device)
        for start in range(0, hessian.shape[0], _CHUNK):
            end = start + _CHUNK
            hessian[start:end, end:] = self._sum[start:end, end:]
            hessian[end:, start:end] = hessian[start:end, end:].T
            square = self._sum[start:end, start:end].float()
            hessian[start:end, start:end] = square.triu() + square.triu(1).T
        self._sum = self._sum.new_empty(0)  # its memory is needed for the factorisation
        return InputStatistics(tokens=int(tokens), hessian=hessian)


EMBEDDING_STEP = "gradients of the embedding"

_SEED = 0


def embedding_gradients(
    stream: BlockStream, hidden: HiddenStates, journal: Journal, progress: Progress = silent
) -> list[HiddenStates]:
    """Stores, of one probe each, of the gradients at the embedding's output (boundary 0), in a folder beside `hidden`,
    which has all states of the teacher. Boundaries that `journal` has are not computed again."""
    gradients = [hidden.beside("gradients-of-rows", torch.bfloat16)]
    below = backward_by_block(stream, hidden, gradients, _SEED, journal, to_embedding=True, progress=progress)
    next(below)
    for _ in progress.over(range(stream.blocks), EMBEDDING_STEP, "block"):
        next(below)
    return gradients


def vocabulary_moments(
    stream: BlockStream,
    hidden: HiddenStates,
    modules: Sequence[Module],
    kind: Statistics,
    gradients: Sequence[HiddenStates],
    process_group: ProcessGroup,
) -> dict[str, MomentSums]:
    """The moments of each of `modules`, of this process's sequences. `hidden` has all states of the teacher, and where
    the embedding is one of `modules`, `gradients` those at its output, by probe."""
    sums = {m.name: MomentSums(m.shape[1], kind, stream.device) for m in modules}
    embedding = next((m.name for m in modules if m.role == "embedding"), None)
    head = embedding if stream.inventory.tied else next((m.name for m in modules if m.role == "lm_head"), None)
    parts = [part for _, part in process_group.share(batches(hidden.shape))]
    if head is not None:
        norm = stream.norm()
        with torch.inference_mode():
            for part in parts:
                sums[head].add(norm(hidden.boundary(stream.blocks)[part].to(stream.device)))
    if embedding is not None:
        factor = stream.embedding_scale / math.sqrt(len(gradients))  # the mean of their products, not the sum
        for store in gradients:
            for part in parts:
                sums[embedding].add(stream.side_states.hidden(store.boundary(0)[part]).to(stream.device) * factor)
    return sums
