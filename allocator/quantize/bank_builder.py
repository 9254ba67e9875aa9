"""Builds the bank block by block, and leaves the teacher's hidden states behind for learning."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from allocator.blocks.calibration.calibration_run import CalibrationRun
from allocator.blocks.finite import require_finite
from allocator.blocks.gradients import backward_by_block
from allocator.blocks.hidden_states import HiddenStates
from allocator.blocks.stream import state_step
from allocator.blocks.tensors import read_rows, torch_dtype, write_safetensors
from allocator.contract.bank import BANK_NAME, Bank, BankModule, ModelReference
from allocator.contract.digest import digest_file
from allocator.contract.errors import InputError
from allocator.contract.layout import ModuleFormat
from allocator.model import CandidateFormats
from allocator.quantize.block_learning import BlockLearning
from allocator.quantize.block_statistics import ModuleStatistics, see_both_sides, see_inputs, see_vocabulary
from allocator.quantize.kfac import Kfac
from allocator.quantize.learned_rounding import LearnedRounding
from allocator.quantize.quantizer import (
    InputStatistics,
    QuantizedModule,
    Quantizer,
    Statistics,
    row_segments,
    row_stripes,
)
from allocator.quantize.statistics import embedding_gradients
from allocator.run.journal import Journal
from allocator.run.process_group import ALONE

__all__ = ["CANDIDATES_STEP", "VOCABULARY_STEP", "build_bank"]

CANDIDATES_STEP = "candidates"

VOCABULARY_STEP = "candidates of the vocabulary"

_DRAWS, _SEED = 4, 2_750_161
"""Of the probes of gradients that candidates are made with. Scores are measured with others, or the candidates would
look better than they are."""

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
    modules = _build_from_first(work) if quantizer.statistics != "kronecker" else _build_from_last(work)
    if work.learning is not None:
        learned = work.learning.learn(to_embedding=work.missing_embedding)
        modules |= {name: _bank_module(work, name, digest) for name, digest in learned.items()}
    modules |= _build(work, None, partial(_see_vocabulary, work))  # the lm_head's inputs are there only now
    if process_group.leads:
        for store in work.stores():
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

    def stores(self) -> list[HiddenStates]:
        """Of the gradients that candidates are made with, one a probe; none where that takes none."""
        if self.quantizer.statistics == "kronecker":
            return [self.run.hidden.beside(f"candidates-{n}", torch.bfloat16) for n in range(_DRAWS)]
        return [] if self.learning is None else self.learning.stores()

    def path(self, name: str) -> Path:
        """Where the candidates of a module are put first."""
        learned = self.learning is not None and self.run.inventory.module(name).block is not None
        return self.folder / (_START if learned else "") / f"{name}.safetensors"


def _build_from_first(work: _Work) -> dict[str, BankModule]:
    """The candidates of all blocks, as the states go through them."""
    run, group, modules = work.run, work.journal.process_group, dict[str, BankModule]()
    for index in run.progress.over(range(run.stream.blocks), CANDIDATES_STEP, "block"):
        modules |= _build(work, index, partial(see_inputs, run, work.quantizer.statistics, index, group))
    return modules


def _build_from_last(work: _Work) -> dict[str, BankModule]:
    """The candidates of all blocks, as the gradients come back through them."""
    run, stores, modules = work.run, work.stores(), dict[str, BankModule]()
    journal = run.journal.section("rounding")
    run.fill()
    below = backward_by_block(
        run.stream, run.hidden, stores, _SEED, journal, work.missing_embedding, run.progress, three_digits=True
    )

    def see(names: list[str]) -> ModuleStatistics:
        return see_both_sides(run, stores, index, names, journal) if names else ModuleStatistics({}, ALONE)

    for done, index in enumerate(below):
        if done == 0:
            run.progress.begin(CANDIDATES_STEP, run.stream.blocks, "block")
        if index >= 0:
            modules |= _build(work, index, see)
            run.progress.reach(done + 1)
    return modules


def _build(work: _Work, block: int | None, see: Callable[[list[str]], ModuleStatistics]) -> dict[str, BankModule]:
    """The candidates of one block, or of what stands outside the blocks; each process of a group quantizes its share
    of the modules. `see` gives the statistics of the modules that are named."""
    names = [m.name for m in work.run.inventory.modules if m.block == block and work.formats[m.name]]
    found = {name: module for name in names if (module := _finished(work, name)) is not None}
    if block is not None and work.learning is not None:
        found |= {name: _bank_module(work, name, digest) for name, digest in work.learning.finished(block).items()}
    missing = [name for name in names if name not in found]
    statistics = see(missing)
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


def _see_vocabulary(work: _Work, names: list[str]) -> ModuleStatistics:
    """The statistics of the modules outside the blocks, where the quantizer needs them."""
    run, kind = work.run, work.quantizer.statistics
    gradients: list[HiddenStates] = []
    if kind != "none" and any(m.role == "embedding" for m in run.inventory.modules if m.name in names):
        gradients = work.stores() or embedding_gradients(run.stream, run.hidden, run.states, run.progress)
    of_inputs: Statistics = "hessian" if kind == "kronecker" else kind
    return see_vocabulary(run, of_inputs, names, gradients, work.journal.process_group)


def _quantize(work: _Work, name: str, statistics: InputStatistics | None, share: float) -> str:
    """Write one module's candidates; returns the digest of the file. They are `share` units of the step.

    Made in stripes of rows, which are independent of each other: of a vocabulary only the packed candidates are whole.
    """
    inventory = work.run.inventory
    stored = inventory.tensor(f"{name}.weight")
    parts: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        segmented = statistics is not None and len(statistics.output_moments) > 0
        stripes = list(row_segments(*stored.shape) if segmented else row_stripes(*stored.shape))
        for number, rows in enumerate(stripes):
            known = statistics.of_segment(number) if statistics is not None and segmented else statistics
            weight = read_rows(stored, rows, work.run.stream.device).float()
            stripe = [form.model_copy(update={"shape": tuple(weight.shape)}) for form in work.formats[name]]
            try:
                for form, quantized in _candidates(work.quantizer, weight, stripe, torch_dtype(inventory.dtype), known):
                    what = f"{name}: scales at {form.num_bits} bits by {work.quantizer.name}"
                    require_finite(quantized.scale, what, "take another --quantizer")
                    for part, tensor in quantized.packed(form.num_bits).items():
                        parts.setdefault(f"w{form.num_bits}.{part}", []).append(tensor.cpu())
                    work.run.progress.advance(share / len(stripes) / len(stripe), name)
            except ArithmeticError as error:
                advice = "try --quantizer mse, or other calibration text"
                raise InputError(f"{name}: {work.quantizer.name}: {error}; {advice}") from None
    tensors = {
        part: of_stripes.pop() if len(of_stripes) == 1 else torch.cat(of_stripes) for part, of_stripes in parts.items()
    }
    for candidate in work.formats[name]:
        tensors[f"w{candidate.num_bits}.weight_shape"] = torch.tensor(candidate.shape, dtype=torch.int64)
    path = work.path(name)
    path.parent.mkdir(exist_ok=True)
    write_safetensors(tensors, path)
    return digest_file(path)


def _candidates(
    quantizer: Quantizer,
    weight: Tensor,
    formats: list[ModuleFormat],
    dtype: torch.dtype,
    statistics: InputStatistics | None,
) -> Iterator[tuple[ModuleFormat, QuantizedModule]]:
    """One after the other, or together where the quantizer is faster so."""
    if isinstance(quantizer, Kfac):
        yield from zip(formats, quantizer.quantize_together(weight, formats, dtype, statistics), strict=True)
    else:
        for form in formats:
            yield form, quantizer.quantize(weight, form, dtype, statistics)
