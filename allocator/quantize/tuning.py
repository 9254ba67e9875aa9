"""After the assignment: block by block the chosen candidates are learned anew, on what the blocks before really give.

In the bank every block is given the original's states, so that one candidate is good beside all others. Once the widths
are chosen, a block can make up for what the blocks before it have done: it is given their states and must still give
the original's. What an error costs is measured at the original, with the Fisher matrix averaged over tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from allocator.blocks.calibration.calibration_run import CalibrationRun
from allocator.blocks.finite import require_finite
from allocator.blocks.gradients import backward_by_block
from allocator.blocks.hidden_states import HiddenStates
from allocator.blocks.stream import batches
from allocator.blocks.tensors import write_safetensors
from allocator.contract.bank import BANK_NAME, Bank, BankModule
from allocator.contract.digest import digest_file
from allocator.contract.layout import ModuleFormat
from allocator.quantize.bank_reader import BankReader
from allocator.quantize.block_learning import mean_metric
from allocator.quantize.learned_rounding import Candidate, LearnedRounding
from allocator.quantize.quantizer import QuantizedModule
from allocator.quantize.reconstruction import Reconstruction
from allocator.run.journal import Journal

__all__ = ["TUNING_STEP", "tune_bank"]

TUNING_STEP = "tuning"

_METRIC_STEP = "Fisher matrices"
_METRIC_SEQUENCES = 32
"""That Fisher matrices are averaged over: their mean is sharp long before there is text enough to learn rounding on."""
_SEED = 5_915_587
"""Of the probes, and of the order of the text: others than learning has."""


def tune_bank(
    run: CalibrationRun,
    bank: BankReader,
    assignment: Mapping[str, ModuleFormat],
    quantizer: LearnedRounding,
    folder: Path,
) -> Bank:
    """Write into `folder` a bank of the candidates of `assignment` alone, those of the blocks tuned; `run.hidden` has
    the original's states.

    One block is in memory at a time. Steps that the sections "rounding" and "bank" of the run's journal have are not
    done again. `bank.json` is written last.
    """
    work = _Work(run, bank, {n: f for n, f in assignment.items() if f.quantized}, quantizer, folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BANK_NAME).unlink(missing_ok=True)
    _find_metrics(work)
    digests = _tune_blocks(work)
    outside = [m.name for m in run.inventory.modules if m.block is None and m.name in work.chosen]
    for name in outside:
        digests[name] = _write(work, name, bank.tensors(name, work.chosen[name]))
    modules = {
        m.name: BankModule(file=f"{m.name}.safetensors", file_digest=digests[m.name], candidates=[work.chosen[m.name]])
        for m in run.inventory.modules
        if m.name in work.chosen
    }
    described = {"quantizer": f"{bank.bank.quantizer}, tuned", "calibration_digest": run.calibration.digest}
    tuned = bank.bank.model_copy(update={**described, "modules": modules})
    tuned.write(folder / BANK_NAME)
    return tuned


@dataclass(frozen=True)
class _Work:
    run: CalibrationRun
    bank: BankReader
    chosen: Mapping[str, ModuleFormat]
    quantizer: LearnedRounding
    folder: Path

    @property
    def metrics(self) -> Journal:
        return self.run.journal.section("rounding")

    @property
    def blocks(self) -> Journal:
        return self.run.journal.section("bank")


def _find_metrics(work: _Work) -> None:
    """Keep the Fisher matrix of each block's output, averaged over tokens, in the journal."""
    run, count = work.run, work.run.stream.blocks
    if all(work.metrics.load(_metric_step(index)) is not None for index in range(count)):
        return
    hidden = run.hidden.first(_METRIC_SEQUENCES)
    stores = [hidden.beside(f"tuning-{n}", torch.bfloat16) for n in range(work.quantizer.draws)]
    below = backward_by_block(run.stream, hidden, stores, _SEED, work.metrics, progress=run.progress, three_digits=True)
    for done, index in enumerate(below):
        if done == 0:
            run.progress.begin(_METRIC_STEP, count, "block")
        compute = partial(mean_metric, stores, index + 1, run.stream.device, work.metrics.process_group)
        work.metrics.once(_metric_step(index), compute)
        run.progress.reach(done + 1)
    for store in stores:
        store.remove()


def _tune_blocks(work: _Work) -> dict[str, str]:
    """Digests of the modules' files by name."""
    run, student = work.run, work.run.hidden.beside("student")
    if work.blocks.load("embedded") is None:
        _embed(work, student)
        work.blocks.save("embedded", True)
    found: dict[str, str] = {}
    for index in run.progress.over(range(run.stream.blocks), TUNING_STEP, "block"):
        step = f"block-{index:04d}"
        digests: dict[str, str] | None = work.blocks.load(step)
        if digests is None:
            digests = _tune_block(work, index, student)
            work.blocks.save(step, digests)
        else:
            run.progress.skip()
        student.forget(index)
        found |= digests
    return found


def _embed(work: _Work, student: HiddenStates) -> None:
    stream, token_ids = work.run.stream, work.run.token_ids
    name = next((m.name for m in work.run.inventory.modules if m.role == "embedding"), None)
    form = None if name is None else work.chosen.get(name)
    table = None if form is None or name is None else work.bank.dequantized(name, form).to(stream.device)
    for rows in batches(token_ids.shape):
        student.boundary(0)[rows] = stream.embed(token_ids[rows], table).cpu()
    student.settle(0)


def _tune_block(work: _Work, index: int, student: HiddenStates) -> dict[str, str]:
    run, prefix = work.run, work.run.inventory.block_prefix(index)
    block = run.stream.block(index)
    names = [m.name for m in run.inventory.modules if m.block == index and m.name in work.chosen]
    metric = work.metrics.load(_metric_step(index))
    assert isinstance(metric, Tensor)
    task = Reconstruction(
        run.stream, block, index, student, run.hidden, [], metric.to(run.stream.device), own_share=0.0
    )
    start = {}
    for name in names:
        form, local = work.chosen[name], name.removeprefix(prefix)
        quantized = QuantizedModule.unpacked(work.bank.tensors(name, form), form.num_bits)
        start[local] = Candidate(block.get_parameter(f"{local}.weight").data, form, quantized)
    digests, weights = {}, {}
    if start:
        learned = work.quantizer.learn(task, start, _SEED + index, run.progress.advance)
        for local, module in learned.modules.items():
            num_bits = start[local].form.num_bits
            digests[prefix + local] = _write(work, prefix + local, module.packed(num_bits))
            weights[f"{local}.weight"] = module.dequantized(num_bits).to(run.stream.device)
    with torch.inference_mode():
        for rows in batches(student.shape):
            states = run.stream.run(block, student.boundary(index)[rows].to(run.stream.device), weights)
            require_finite(states, f"the output of {prefix[:-1]} with its tuned weights")
            student.boundary(index + 1)[rows] = states.cpu()
    student.settle(index + 1)
    return digests


def _write(work: _Work, name: str, parts: Mapping[str, Tensor]) -> str:
    prefix, path = f"w{work.chosen[name].num_bits}.", work.folder / f"{name}.safetensors"
    write_safetensors({prefix + part: tensor.cpu().contiguous() for part, tensor in parts.items()}, path)
    return digest_file(path)


def _metric_step(index: int) -> str:
    return f"metric-{index:04d}"
