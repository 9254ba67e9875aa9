"""The statistics that candidates are made with: of a block's modules, and of those outside the blocks."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from allocator.blocks.backward import BlockBackward
from allocator.blocks.calibration.calibration_run import CalibrationRun
from allocator.blocks.finite import require_finite
from allocator.blocks.gradients import finish_boundary, keep_gradient
from allocator.blocks.hidden_states import HiddenStates
from allocator.blocks.stream import batches, record_inputs, state_step
from allocator.quantize.quantizer import InputStatistics, Statistics, row_segments
from allocator.quantize.statistics import MomentSums, vocabulary_moments
from allocator.run.journal import Journal
from allocator.run.process_group import ProcessGroup

__all__ = ["ModuleStatistics", "see_both_sides", "see_inputs", "see_vocabulary"]

_BATCH_TOKENS = 2048
"""Of which everything that a block computes is kept, beside the sums of all of its modules."""


class ModuleStatistics:
    """Of some modules: summed by module, finished when one is taken, then let go.

    inputs: by the modules that share an input; outputs: of the gradients at a module's outputs, by its row segments.
    """

    def __init__(
        self,
        inputs: dict[tuple[str, ...], MomentSums],
        process_group: ProcessGroup,
        outputs: dict[str, list[MomentSums]] | None = None,
    ) -> None:
        self._sums = {name: (sharing, moments) for sharing, moments in inputs.items() for name in sharing}
        self._outputs = outputs or {}
        self._finished: dict[tuple[str, ...], InputStatistics] = {}
        self._process_group = process_group

    def take(self, name: str) -> InputStatistics | None:
        """Those of `name`, None if its quantizer needs none. Each name can be taken once."""
        if name not in self._sums:
            return None
        sharing, moments = self._sums.pop(name)
        if sharing not in self._finished:
            found = moments.finish(self._process_group)
            require_finite(found.diagonal, f"{name}: second moments of its inputs")
            self._finished[sharing] = found
        last = not any(other in self._sums for other in sharing)
        found = self._finished.pop(sharing) if last else self._finished[sharing]
        segments = [self._output_moments(name, sums) for sums in self._outputs.pop(name, [])]
        return replace(found, output_moments=segments) if segments and found.tokens else found

    def _output_moments(self, name: str, sums: MomentSums) -> Tensor:
        found = sums.finish(self._process_group)
        require_finite(found.diagonal, f"{name}: second moments of the gradients at its outputs")
        assert found.hessian is not None
        return found.hessian.div_(max(found.tokens, 1))


def see_inputs(
    run: CalibrationRun, kind: Statistics, index: int, group: ProcessGroup, names: list[str]
) -> ModuleStatistics:
    """Fill the states after block `index`, unless they are there and nothing is to be learned from the run; return
    the statistics of the inputs of the modules `names` where `kind` asks for them."""
    prefix = run.inventory.block_prefix(index)
    recorded = names if kind != "none" else []
    inputs = _InputSums(run, kind, index)
    # Read once, before the processes meet: later, one might already see what another has written.
    missing = run.states.load(state_step(index + 1)) is None
    if recorded or missing:
        local = [name.removeprefix(prefix) for name in recorded]
        run.stream.fill_block(run.hidden, index, local, inputs.add, group)
        if missing:
            run.states.save(state_step(index + 1), True)
    return ModuleStatistics(inputs.of(recorded, group), group)


def see_both_sides(
    run: CalibrationRun, gradients: Sequence[HiddenStates], index: int, names: list[str], journal: Journal
) -> ModuleStatistics:
    """Statistics of the modules `names` of block `index`: of their inputs x, and of the gradients g at their outputs.

    They are what the Fisher matrix of a weight, the mean of g x^T times itself over tokens and probes, says of its
    rows and of its columns alone: the means of |x|^2 g g^T and of |g|^2 x x^T (its partial traces). So a token counts
    by what an error there does to the predictions: that of an attention sink is one in hundreds, and most of what the
    errors of a v_proj cost is there.

    `gradients`, by probe, has those at the block's output, and those at its input afterwards, which `journal` is told.
    """
    group, stream, prefix = journal.process_group, run.stream, run.inventory.block_prefix(index)
    block = stream.block(index)
    sums = {name.removeprefix(prefix): _BothSides(run.inventory.module(name).shape, stream.device) for name in names}
    inputs: dict[str, Tensor] = {}

    def keep(sharing: list[str], x: Tensor) -> None:
        inputs.update(dict.fromkeys(sharing, x.detach()))

    for _, part in group.share(batches(run.hidden.shape, _BATCH_TOKENS)):
        states = run.hidden.boundary(index)[part].to(stream.device)
        inputs.clear()
        with record_inputs(block, [*sums], keep):
            backward = BlockBackward(stream, block, states, outputs_of=[*sums], three_digits=True)
        energies = {name: x.new_zeros(x.shape[:-1]) for name, x in inputs.items()}
        for store in gradients:
            above = store.boundary(index + 1)[part].to(stream.device).float()
            pulled = backward.pull(above, store is gradients[-1])
            keep_gradient(store, index, part, pulled.at_states)
            for name, at_output in pulled.at_outputs.items():
                energies[name] += at_output.square().sum(-1)
                sums[name].add_gradients(at_output, inputs[name])
        for name, x in inputs.items():
            sums[name].inputs.add(x * (energies[name] / len(gradients)).sqrt().unsqueeze(-1))
    finish_boundary(gradients, index, journal, may_stop=False)
    found = {prefix + name: of_one for name, of_one in sums.items()}
    return ModuleStatistics(
        {(name,): of_one.inputs for name, of_one in found.items()},
        group,
        {name: of_one.outputs for name, of_one in found.items()},
    )


class _BothSides:
    """The sums of one module of `shape`: of its inputs, and of the gradients at its outputs by row segments."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self._rows = row_segments(*shape)
        self.inputs = MomentSums(shape[1], "hessian", device)
        self.outputs = [MomentSums(rows.stop - rows.start, "hessian", device) for rows in self._rows]

    def add_gradients(self, gradients: Tensor, inputs: Tensor) -> None:
        sizes = inputs.square().mean(-1, keepdim=True).sqrt()
        for rows, sums in zip(self._rows, self.outputs, strict=True):
            sums.add(gradients[..., rows] * sizes)


class _InputSums:
    """The moments of the inputs of a block's modules, which some of them share."""

    def __init__(self, run: CalibrationRun, kind: Statistics, index: int) -> None:
        self._kind, self._device, self._prefix = kind, run.stream.device, run.inventory.block_prefix(index)
        self._columns = {m.name: m.shape[1] for m in run.inventory.modules if m.block == index}
        self._sums: dict[tuple[str, ...], MomentSums] = {}

    def add(self, sharing: list[str], x: Tensor) -> None:
        self._begin(tuple(self._prefix + name for name in sharing)).add(x.detach())

    def of(self, names: list[str], group: ProcessGroup) -> dict[tuple[str, ...], MomentSums]:
        """Those of all of `names`, by those that share them."""
        # A module that saw no token, in this process or in any, has sums of zero: an expert that was never chosen.
        seen = {sharing for of_one in group.gather({group.rank: list(self._sums)}) for sharing in of_one}
        unseen = set(names) - {name for sharing in seen for name in sharing}
        for sharing in sorted(seen | {(name,) for name in unseen}):
            self._begin(sharing)
        return self._sums

    def _begin(self, sharing: tuple[str, ...]) -> MomentSums:
        return self._sums.setdefault(sharing, MomentSums(self._columns[sharing[0]], self._kind, self._device))


def see_vocabulary(
    run: CalibrationRun, kind: Statistics, names: list[str], gradients: Sequence[HiddenStates], group: ProcessGroup
) -> ModuleStatistics:
    """The statistics of the inputs of `names`, outside the blocks, where `kind` asks for them. `gradients`: those at
    the embedding's output, by probe, where it is among them."""
    wanted = [m for m in run.inventory.modules if m.name in names and kind != "none"]
    sums = vocabulary_moments(run.stream, run.hidden, wanted, kind, gradients, group)
    return ModuleStatistics({(name,): moments for name, moments in sums.items()}, group)
