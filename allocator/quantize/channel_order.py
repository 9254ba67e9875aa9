"""The order of an MLP's channels: by what rounding its rows of gate_proj and up_proj does to the block's output.

h = act(g) u is what down_proj is given, g and u being the outputs of the two modules. Rounding a row with steps of d
makes errors that are about independent, of variance d^2 / 12 a weight, so an error of variance sum_k x_k^2 d_k^2 / 12
in its output, d being the range of a group of weights divided by the number of steps. Channel j of h then has an error
of (dh/dg)^2 and (dh/du)^2 times that, and the output of the block one of |W_down[:, j]|^2 times that. Constant factors
do not matter to the order, so no width does.
"""

from typing import Any

import torch
from torch import Tensor, nn

from allocator.blocks.calibration.calibration_run import CalibrationRun
from allocator.blocks.stream import state_step
from allocator.contract.bank import Bank
from allocator.contract.channel_blocks import CUT, REORDERED, ChannelBlocks, ChannelOrder
from allocator.contract.layout import usable_group_size
from allocator.model import Inventory, in_channel_order
from allocator.run.process_group import ProcessGroup

__all__ = ["find_channel_order", "in_order"]

_TOKENS = 512


def in_order(run: CalibrationRun, cut: Inventory, bank: Bank | None, group_size: int) -> CalibrationRun:
    """`run`, which is on the model as it is stored, on the modules that `cut` has, their channels in the order of
    `bank`; without one in an order that is found now (see `find_channel_order`)."""
    if cut.channels is None:
        return run
    order = find_channel_order(run, cut.channels.layout, group_size) if bank is None else bank.channel_order
    return run.of(in_channel_order(run.inventory, order))


def find_channel_order(run: CalibrationRun, layout: ChannelBlocks, group_size: int) -> ChannelOrder:
    """The order of the channels of every block on the calibration text.

    Fills `run.hidden` with the teacher's states. The section "channels" of the run's journal has the orders of blocks.
    `group_size` is the largest that candidates may have.
    """
    stream, hidden, states, journal = run.stream, run.hidden, run.states, run.journal.section("channels")
    process_group = journal.process_group
    if states.load(state_step(0)) is None:
        stream.fill_embeddings(hidden, run.token_ids, process_group)
        states.save(state_step(0), True)
    mlp = CUT[0].rpartition(".")[0]
    orders = {}
    for index in run.progress.over(range(stream.blocks), "channels", "block"):
        step = f"channels-{index:04d}"
        order = journal.load(step)
        filled = states.load(state_step(index + 1)) is not None
        if order is not None and filled:
            run.progress.skip()
        else:
            block = stream.block(index)
            losses = _ChannelLosses(block, group_size)
            stream.fill_block(hidden, index, [CUT[0]], losses.add, process_group, block)
            if not filled:
                states.save(state_step(index + 1), True)
            order = laid_out(losses.finish(process_group), layout)
            journal.save(step, order)
        orders[f"{stream.inventory.block_prefix(index)}{mlp}"] = ChannelOrder.text(order.tolist())
    return ChannelOrder(blocks=layout.blocks, chunks=layout.chunks, orders=orders)


def laid_out(losses: Tensor, layout: ChannelBlocks) -> Tensor:
    """The channels with `losses` `[N]` in the order of the layout, int64 `[N]`: the costliest make up piece 0."""
    ranked = losses.argsort(descending=True, stable=True)
    width = len(ranked) // layout.blocks
    order = torch.empty_like(ranked)
    for piece in range(layout.blocks):
        order[layout.rows_of(piece, width).numbers()] = ranked[piece * width : (piece + 1) * width]
    return order


class _ChannelLosses:
    """Sums of the losses of a block's channels over tokens: float64, so that their order hardly counts."""

    def __init__(self, block: nn.Module, group_size: int) -> None:
        self._mlp: Any = block.get_submodule(CUT[0].rpartition(".")[0])
        gate, up, down = (block.get_parameter(f"{local}.weight") for local in (*CUT, REORDERED))
        self._group = usable_group_size(gate.shape[1], group_size) or gate.shape[1]
        self._ranges = [_squared_ranges(weight, self._group) for weight in (gate, up)]
        self._norms = down.double().square().sum(0)
        self._sums = [torch.zeros_like(of_rows, dtype=torch.float64) for of_rows in self._ranges]

    def add(self, _names: list[str], inputs: Tensor) -> None:
        """Add inputs `[..., K]` of the MLP."""
        with torch.inference_mode(False), torch.enable_grad():
            for x in torch.split(inputs.clone().flatten(0, -2), _TOKENS):
                parts = [self._mlp.gate_proj(x).requires_grad_(True), self._mlp.up_proj(x).requires_grad_(True)]
                output = self._mlp.act_fn(parts[0]) * parts[1]
                of_groups = x.square().view(len(x), -1, self._group).sum(-1)
                for total, slope in zip(self._sums, torch.autograd.grad(output.sum(), parts), strict=True):
                    total += slope.square().T @ of_groups

    def finish(self, process_group: ProcessGroup) -> Tensor:
        """The loss of each channel over the tokens of all processes, float32 `[N]`, up to a constant factor."""
        losses = torch.zeros_like(self._norms)
        for total, squared in zip(self._sums, self._ranges, strict=True):
            process_group.add_up(total)
            losses += (total * squared).sum(1)
        return (losses * self._norms).float().cpu()


def _squared_ranges(weight: Tensor, group: int) -> Tensor:
    """(max - min)^2 of each group of weights: `[N, K / group]`."""
    groups = weight.view(len(weight), -1, group)
    return (groups.amax(-1) - groups.amin(-1)).square()
