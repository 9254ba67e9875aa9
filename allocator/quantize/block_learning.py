"""The second pass over a bank's blocks, from the last to the first: narrow candidates of a block learned together."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from allocator.blocks.calibration.calibration_run import CalibrationRun
from allocator.blocks.finite import require_finite
from allocator.blocks.gradients import backward_by_block
from allocator.blocks.hidden_states import HiddenStates
from allocator.blocks.stream import batches
from allocator.blocks.tensors import write_safetensors
from allocator.contract.digest import digest_file
from allocator.contract.layout import ModuleFormat
from allocator.quantize.learned_rounding import Candidate, LearnedRounding
from allocator.quantize.quantizer import QuantizedModule
from allocator.quantize.reconstruction import Reconstruction
from allocator.quantize.statistics import MomentSums
from allocator.run.journal import Journal
from allocator.run.process_group import ProcessGroup

__all__ = ["ROUNDING_STEP", "BlockLearning", "mean_metric"]

ROUNDING_STEP = "learning to round"

_LOG = logging.getLogger(__name__)
_SEED = 7_368_787
"""Of the probes. Scores are measured with others, or the candidates would look better than they are."""


@dataclass(frozen=True)
class BlockLearning:
    """What there is to learn: `formats` of each module; candidates to begin with are in the folder `start`, one file a
    module, and files of the same names come into `folder`.

    Widths of a block are shared out to the processes of a group; each is kept in the section "rounding" of the run's
    journal when it is done.
    """

    run: CalibrationRun
    quantizer: LearnedRounding
    formats: Mapping[str, Sequence[ModuleFormat]]
    start: Path
    folder: Path

    @property
    def journal(self) -> Journal:
        return self.run.journal.section("rounding")

    def finished(self, index: int) -> dict[str, str]:
        """Digests of the files of block `index` by module, none if it has not been learned yet."""
        digests: dict[str, str] = self.journal.load(_block_step(index)) or {}
        there = all((self.folder / f"{name}.safetensors").exists() for name in digests)
        return digests if there else {}

    def learn(self, to_embedding: bool = False) -> dict[str, str]:
        """Learn all blocks that have not been; returns the digests of the files of all by module.

        `run.hidden` has all of the original's states. With `to_embedding`, boundary 0 of `stores` is there afterwards.
        """
        blocks = range(self.run.stream.blocks)
        found: dict[str, str] = {}
        if to_embedding or any(not self.finished(index) for index in blocks if self._names(index)):
            found |= self._learn(to_embedding)
        for index in blocks:
            found |= self.finished(index)
        return found

    def stores(self) -> list[HiddenStates]:
        """Of the gradients, one a probe."""
        return [self.run.hidden.beside(f"rounding-{n}", torch.bfloat16) for n in range(self.quantizer.draws)]

    def _learn(self, to_embedding: bool) -> dict[str, str]:
        run, stores = self.run, self.stores()
        below = backward_by_block(
            run.stream, run.hidden, stores, _SEED, self.journal, to_embedding, run.progress, three_digits=True
        )
        found: dict[str, str] = {}
        for done, index in enumerate(below):
            if done == 0:
                run.progress.begin(ROUNDING_STEP, run.stream.blocks, "block")
            if index < 0:
                continue
            of_block = self.finished(index)
            if of_block or not self._names(index):
                run.progress.skip()
            else:
                of_block = self._learn_block(index, stores)
            found |= of_block
            run.progress.reach(done + 1)
        return found

    def _names(self, index: int) -> list[str]:
        return [m.name for m in self.run.inventory.modules if m.block == index and self.formats[m.name]]

    def _learn_block(self, index: int, stores: list[HiddenStates]) -> dict[str, str]:
        names, group = self._names(index), self.journal.process_group
        widths = sorted({f.num_bits for name in names for f in self.formats[name] if self.quantizer.learns(f)})
        missing = [bits for bits in widths if self._width(index, bits) is None]
        self.run.progress.skip((len(widths) - len(missing)) / max(len(widths), 1))
        if missing:
            run, block = self.run, self.run.stream.block(index)
            metric = mean_metric(stores, index + 1, run.stream.device, group)
            task = Reconstruction(
                run.stream, block, index, run.hidden, run.hidden, stores, metric, self.quantizer.own_share
            )
            for first in range(0, len(missing), group.size):
                together = missing[first : first + group.size]
                share = len(together) / len(widths)
                mine = {i: self._learn_width(task, names, bits, share) for i, bits in group.share(together)}
                for bits, losses in zip(together, group.gather(mine), strict=True):
                    self.journal.save(_width_step(index, bits), losses)
        digests = group.from_leader(lambda: self._put_together(index, names, widths))
        self.journal.save(_block_step(index), digests)
        if group.leads:
            for path in [self.start / f"{name}.safetensors" for name in names] + [
                self._width_path(index, bits) for bits in widths
            ]:
                path.unlink(missing_ok=True)
        return digests

    def _learn_width(self, task: Reconstruction, names: list[str], num_bits: int, share: float) -> list[float]:
        """Write the candidates of a block at one width; returns their loss before and after."""
        progress, prefix = self.run.progress, self.run.inventory.block_prefix(task.index)
        start = {}
        for name in names:
            form = next((f for f in self.formats[name] if f.num_bits == num_bits), None)
            if form is not None:
                local = name.removeprefix(prefix)
                start[local] = Candidate(_weight(task.block, local), form, self._started(name, num_bits))
        seed = task.index * 16 + num_bits
        learned = self.quantizer.learn(
            task, start, seed, lambda of, detail: progress.advance(of * share, f"{num_bits} bits, {detail}")
        )
        tensors = {
            f"{prefix}{local}.{part}": tensor.cpu()
            for local, module in learned.modules.items()
            for part, tensor in module.packed(num_bits).items()
        }
        write_safetensors(tensors, self._width_path(task.index, num_bits))
        _LOG.info(
            "%s at %d bits: %.4g nats a token of %.4g, on text held back",
            prefix[:-1], num_bits, learned.loss, learned.loss_before,
        )  # fmt: skip
        return [learned.loss_before, learned.loss]

    def _started(self, name: str, num_bits: int) -> QuantizedModule:
        prefix = f"w{num_bits}."
        stored = load_file(self.start / f"{name}.safetensors")
        parts = {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}
        return QuantizedModule.unpacked(parts, num_bits)

    def _put_together(self, index: int, names: list[str], widths: Sequence[int]) -> dict[str, str]:
        """Write the files of the block's modules: of the candidates begun with those that were not learned."""
        learned = {bits: load_file(self._width_path(index, bits)) for bits in widths}
        digests = {}
        for name in names:
            tensors = dict(load_file(self.start / f"{name}.safetensors"))
            for bits, of_width in learned.items():
                parts = {key.removeprefix(f"{name}."): t for key, t in of_width.items() if key.startswith(f"{name}.")}
                tensors |= {f"w{bits}.{part}": tensor for part, tensor in parts.items()}
            path = self.folder / f"{name}.safetensors"
            write_safetensors(tensors, path)
            digests[name] = digest_file(path)
        return digests

    def _width(self, index: int, num_bits: int) -> list[float] | None:
        """The losses of a width that has been learned."""
        losses: list[float] | None = self.journal.load(_width_step(index, num_bits))
        return losses if self._width_path(index, num_bits).exists() else None

    def _width_path(self, index: int, num_bits: int) -> Path:
        return self.start / f"block-{index:04d}-w{num_bits}.safetensors"


def mean_metric(
    stores: Sequence[HiddenStates], boundary: int, device: torch.device, process_group: ProcessGroup
) -> Tensor:
    """The mean of g g^T over probes and tokens at a boundary: float32 `[D, D]`."""
    sums = MomentSums(stores[0].shape[2], "hessian", device)
    for _, rows in process_group.share(batches(stores[0].shape)):
        for store in stores:
            sums.add(store.boundary(boundary)[rows].to(device))
    found = sums.finish(process_group)
    assert found.hessian is not None
    require_finite(found.diagonal, f"second moments of gradients at boundary {boundary}")
    return found.hessian / max(found.tokens, 1)


def _weight(block: nn.Module, local: str) -> Tensor:
    return block.get_parameter(f"{local}.weight").data


def _block_step(index: int) -> str:
    return f"block-{index:04d}"


def _width_step(index: int, num_bits: int) -> str:
    return f"block-{index:04d}-w{num_bits}"
