"""Builds the bank block by block, and leaves the teacher's hidden states behind for learning."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from allocator.blocks.calibration.calibration_run import CalibrationRun
from allocator.blocks.finite import require_finite
from allocator.blocks.stream import state_step
from allocator.blocks.tensors import read_rows, torch_dtype, write_safetensors
from allocator.contract.bank import BANK_NAME, Bank, BankModule, ModelReference
from allocator.contract.digest import digest_file
from allocator.contract.errors import InputError
from allocator.contract.layout import ModuleFormat
from allocator.model import CandidateFormats
from allocator.quantize.block_learning import BlockLearning
from allocator.quantize.learned_rounding import LearnedRounding
from allocator.quantize.quantizer import InputStatistics, Quantizer, row_stripes
from allocator.quantize.statistics import MomentSums, embedding_gradients, vocabulary_moments
from allocator.run.journal import Journal
from allocator.run.process_group import ProcessGroup

__all__ = ["VOCABULARY_STEP", "build_bank"]

VOCABULARY_STEP = "candidates of the vocabulary"

_START = "start"
"""The sub-folder with the candidates that learning begins with."""


def build_bank(
    run: CalibrationRun, model: ModelReference, quantizer: Quantizer, candidates: CandidateFormats, folder: Path
) -> Bank:
    """Quantize every quantizable module to every width below 16, write `folder`, fill `run.hidden` with teacher states.

    `bank.json` is written last: a folder without it is an unfinished bank. Modules that the section "bank" of the
    run's journal has, and whose file is there, are not made again.
    """
    stream, states, process_group = run.stream, run.states, run.journal.process_group
    if process_group.leads:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BANK_NAME).unlink(missing_ok=True)
    process_group.wait()
    if states.load(state_step(0)) is None:
        stream.fill_embeddings(run.hidden, run.token_ids, process_group)
        states.save(state_step(0), True)
    work = _Work(run, quantizer, candidates.of(run.inventory), folder)
    modules: dict[str, BankModule] = {}
    for index in run.progress.over(range(stream.blocks), "candidates", "block"):
        modules |= _build(work, index, partial(_run_teacher, work, index))
    if work.learning is not None:
        learned = work.learning.learn(to_embedding=work.missing_embedding)
        modules |= {name: _bank_module(work, name, digest) for name, digest in learned.items()}
    modules |= _build(work, None, partial(_see_vocabulary, work))  # the lm_head's inputs are there only now
    if work.learning is not None and process_group.leads:
        for store in work.learning.stores():
            store.remove()
    bank = Bank(
        model=model,
        dtype=run.inventory.dtype,
        quantizer=quantizer.name,
        group_size=candidates.group_size,
        symmetric=candidates.symmetric,
        calibration_digest=run.calibration.digest,
        channel_order=run.inventory.channels,
        modules=modules,
    )
    if process_group.leads:
        bank.write(folder / BANK_NAME)
        shutil.rmtree(folder / _START, ignore_errors=True)
    process_group.wait()
    return bank


@dataclass(frozen=True)
class _Work:
    """What the steps have in common. formats: the quantized ones of each module, none for one that stays at 16 bits."""

    run: CalibrationRun
    quantizer: Quantizer
    formats: dict[str, list[ModuleFormat]]
    folder: Path

    @property
    def journal(self) -> Journal:
        """Digest of the file of each finished module, by its name."""
        return self.run.journal.section("bank")

    @property
    def learning(self) -> BlockLearning | None:
        """What comes after all modules, where the quantizer goes on with whole blocks."""
        if not isinstance(self.quantizer, LearnedRounding):
            return None
        return BlockLearning(self.run, self.quantizer, self.formats, self.folder / _START, self.folder)

    @property
    def missing_embedding(self) -> bool:
        """Whether the embedding is still to be quantized, by the gradients at its output."""
        found = [m.name for m in self.run.inventory.modules if m.role == "embedding" and self.formats[m.name]]
        return any(_finished(self, name) is None for name in found)

    def path(self, name: str) -> Path:
        """Where the candidates of a module are put first."""
        learned = self.learning is not None and self.run.inventory.module(name).block is not None
        return self.folder / (_START if learned else "") / f"{name}.safetensors"


def _build(work: _Work, block: int | None, see_inputs: Callable[[list[str]], "_Statistics"]) -> dict[str, BankModule]:
    """The candidates of one block, or of what stands outside the blocks; each process of a group quantizes its share
    of the modules. `see_inputs` gives the statistics of the modules that are named."""
    names = [m.name for m in work.run.inventory.modules if m.block == block and work.formats[m.name]]
    found = {name: module for name in names if (module := _finished(work, name)) is not None}
    if block is not None and work.learning is not None:
        found |= {name: _bank_module(work, name, digest) for name, digest in work.learning.finished(block).items()}
    missing = [name for name in names if name not in found]
    statistics = see_inputs(missing)
    process_group = work.journal.process_group
    if block is None and names:
        work.run.progress.begin(VOCABULARY_STEP, len(names), "module")
    share = 1.0 if block is None else 1 / max(len(names), 1)
    work.run.progress.skip(share * len(found))
    for start in range(0, len(missing), process_group.size):
        together = missing[start : start + process_group.size]
        of_inputs = {name: statistics.take(name) for name in together}  # on every process: they add up their sums
        mine = {
            i: _quantize(work, name, of_inputs[name], share * len(together))
            for i, name in process_group.share(together)
        }
        for name, digest in zip(together, process_group.gather(mine), strict=True):
            work.journal.save(name, digest)
            found[name] = _bank_module(work, name, digest)
    return {name: found[name] for name in names}


def _finished(work: _Work, name: str) -> BankModule | None:
    """The module, if the journal has it and its file is there. Its content is checked when it is used."""
    digest = work.journal.load(name)
    if not isinstance(digest, str) or not work.path(name).exists():
        return None
    return _bank_module(work, name, digest)


def _bank_module(work: _Work, name: str, digest: str) -> BankModule:
    return BankModule(file=f"{name}.safetensors", file_digest=digest, candidates=work.formats[name])


class _Statistics:
    """The input statistics of some modules: summed by module, finished when one is taken, then let go."""

    def __init__(self, sums: dict[tuple[str, ...], MomentSums], process_group: ProcessGroup) -> None:
        self._sums = {name: (sharing, moments) for sharing, moments in sums.items() for name in sharing}
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
        return self._finished.pop(sharing) if last else self._finished[sharing]


def _run_teacher(work: _Work, index: int, names: list[str]) -> _Statistics:
    """Fill the states after block `index`, unless they are there and nothing is to be learned from the run; return
    the input statistics of the modules `names` where the quantizer needs them."""
    kind, process_group, prefix = (
        work.quantizer.statistics,
        work.journal.process_group,
        work.run.inventory.block_prefix(index),
    )
    recorded = names if kind != "none" else []
    shapes = {m.name: m.shape for m in work.run.inventory.modules if m.block == index}
    sums: dict[tuple[str, ...], MomentSums] = {}

    def begin(sharing: tuple[str, ...]) -> MomentSums:
        return sums.setdefault(sharing, MomentSums(shapes[sharing[0]][1], kind, work.run.stream.device))

    def accumulate(sharing: list[str], x: Tensor) -> None:
        begin(tuple(prefix + name for name in sharing)).add(x)

    # Read once, before the processes meet: later, one might already see what another has written.
    missing = work.run.states.load(state_step(index + 1)) is None
    if recorded or missing:
        local = [name.removeprefix(prefix) for name in recorded]
        work.run.stream.fill_block(work.run.hidden, index, local, accumulate, process_group)
        if missing:
            work.run.states.save(state_step(index + 1), True)
    # A module that saw no token, in this process or in any, has sums of zero: an expert that was never chosen.
    seen = {sharing for of_one in process_group.gather({process_group.rank: list(sums)}) for sharing in of_one}
    unseen = set(recorded) - {name for sharing in seen for name in sharing}
    for sharing in sorted(seen | {(name,) for name in unseen}):
        begin(sharing)
    return _Statistics(sums, process_group)


def _see_vocabulary(work: _Work, names: list[str]) -> _Statistics:
    """The statistics of the modules outside the blocks, where the quantizer needs them."""
    kind, process_group = work.quantizer.statistics, work.journal.process_group
    wanted = [m for m in work.run.inventory.modules if m.name in names and kind != "none"]
    run, gradients = work.run, []
    if any(m.role == "embedding" for m in wanted):
        learning = work.learning
        gradients = (
            embedding_gradients(run.stream, run.hidden, run.states, run.progress)
            if learning is None
            else learning.stores()
        )
    sums = vocabulary_moments(run.stream, run.hidden, wanted, kind, gradients, process_group)
    return _Statistics({(name,): moments for name, moments in sums.items()}, process_group)


def _quantize(work: _Work, name: str, statistics: InputStatistics | None, share: float) -> str:
    """Write one module's candidates; returns the digest of the file. They are `share` units of the step.

    Made in stripes of rows, which are independent of each other: of a vocabulary only the packed candidates are whole.
    """
    inventory = work.run.inventory
    stored = inventory.tensor(f"{name}.weight")
    parts: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        stripes = list(row_stripes(*stored.shape))
        for rows in stripes:
            weight = read_rows(stored, rows, work.run.stream.device).float()
            for candidate in work.formats[name]:
                stripe = candidate.model_copy(update={"shape": tuple(weight.shape)})
                try:
                    quantized = work.quantizer.quantize(weight, stripe, torch_dtype(inventory.dtype), statistics)
                except ArithmeticError as error:
                    advice = "try --quantizer mse, or other calibration text"
                    raise InputError(f"{name}: {work.quantizer.name}: {error}; {advice}") from None
                what = f"{name}: scales at {candidate.num_bits} bits by {work.quantizer.name}"
                require_finite(quantized.scale, what, "take another --quantizer")
                for part, tensor in quantized.packed(candidate.num_bits).items():
                    parts.setdefault(f"w{candidate.num_bits}.{part}", []).append(tensor.cpu())
                work.run.progress.advance(share / len(stripes) / len(work.formats[name]), name)
    tensors = {
        part: of_stripes.pop() if len(of_stripes) == 1 else torch.cat(of_stripes) for part, of_stripes in parts.items()
    }
    for candidate in work.formats[name]:
        tensors[f"w{candidate.num_bits}.weight_shape"] = torch.tensor(candidate.shape, dtype=torch.int64)
    path = work.path(name)
    path.parent.mkdir(exist_ok=True)
    write_safetensors(tensors, path)
    return digest_file(path)
