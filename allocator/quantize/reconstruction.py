"""What the error of a block's output costs, on text that it is given again and again: what rounding is learned by.

A token's error e costs e^T F e / 2 nats to second order, F being the Fisher matrix of the block's output at that token
(see `blocks.gradients`: the mean of g g^T over probes). A few probes say little of F at one token, and weights that are
learned by them alone learn the probes too; their mean over all tokens is sharp, but alike for all. So F is taken as a
mixture of both, as covariances are shrunk towards their mean (Ledoit and Wolf 2004).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from allocator.blocks.hidden_states import HiddenStates
from allocator.blocks.products import half_products, has_bfloat16
from allocator.blocks.stream import BlockStream

__all__ = ["HELD_BACK", "Reconstruction"]

HELD_BACK = 8
"""One sequence of so many is not learned on."""

_TOGETHER = 4096
"""Tokens that are run at once."""


@dataclass(frozen=True)
class Reconstruction:
    """Block `index`, what it is given and what it must give.

    inputs: the store whose boundary `index` the block is given, the original's or those of a quantized model; outputs:
    that of the original, whose boundary `index` + 1 it must give; gradients: by probe, at that boundary; metric: the
    mean of g g^T over probes and tokens, float32 `[D, D]`; own_share: of a token's own probes in F, 0 to 1.
    """

    stream: BlockStream
    block: nn.Module
    index: int
    inputs: HiddenStates
    outputs: HiddenStates
    gradients: Sequence[HiddenStates]
    metric: Tensor
    own_share: float

    def learned(self) -> list[int]:
        """Numbers of the sequences that are learned on: all but every eighth, or all where there are few."""
        sequences = range(self.inputs.shape[0])
        return [s for s in sequences if len(sequences) < HELD_BACK or s % HELD_BACK]

    def held_back(self) -> list[int]:
        """Numbers of the sequences that tell which of several weights is best."""
        sequences = range(self.inputs.shape[0])
        return [s for s in sequences if len(sequences) < HELD_BACK or s % HELD_BACK == 0]

    def loss(self, weights: dict[str, Tensor], sequences: Sequence[int]) -> float:
        """Nats a token with `weights`, by parameter name, in the place of the block's own."""
        with torch.no_grad():
            return sum(float(self._loss(weights, rows)) * len(rows) for rows in self._parts(sequences)) / len(sequences)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights that gradients are asked for: what products are made of anyway, at half the memory."""
        return torch.bfloat16 if has_bfloat16(self.stream.device) else torch.float32

    def gradient(self, weights: dict[str, Tensor], sequences: Sequence[int]) -> tuple[float, dict[str, Tensor]]:
        """`loss`, and its gradient by each of `weights`. Products in bfloat16 where the device is faster with it."""
        leaves = {name: weight.detach().requires_grad_(True) for name, weight in weights.items()}
        total = 0.0
        for rows in self._parts(sequences):
            with half_products(self.stream.device):
                loss = self._loss(leaves, rows) * (len(rows) / len(sequences))
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total, {name: _gradient(leaf) for name, leaf in leaves.items()}

    def _parts(self, sequences: Sequence[int]) -> list[list[int]]:
        size = max(1, _TOGETHER // self.inputs.shape[1])
        return [list(sequences[start : start + size]) for start in range(0, len(sequences), size)]

    def _loss(self, weights: dict[str, Tensor], rows: list[int]) -> Tensor:
        read = partial(_read, rows=rows, device=self.stream.device)
        output = self.stream.run(self.block, read(self.inputs, self.index), weights)
        with torch.autocast(self.stream.device.type, enabled=False):
            error = output.float() - read(self.outputs, self.index + 1)
            loss = (1 - self.own_share) * ((error @ self.metric) * error).sum(-1).mean()
            if self.own_share:
                probes = [(read(store, self.index + 1) * error).sum(-1).square().mean() for store in self.gradients]
                loss = loss + self.own_share * torch.stack(probes).mean()
            return loss / 2


def _read(store: HiddenStates, boundary: int, rows: list[int], device: torch.device) -> Tensor:
    return store.boundary(boundary)[rows].to(device).float()


def _gradient(leaf: Tensor) -> Tensor:
    """Zero for the weights of an expert that no token chose."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
