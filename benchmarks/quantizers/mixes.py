"""Which candidates are best beside others of any width: learned together, in mixes of widths, one by one, or kfac's?

    make bench-mixes

One block of ref-7m, all else original, KL on held-out text over that of gptq's candidates: all modules at 2 bits, at 3
bits, and the mean of mixes drawn at random.
"""

import argparse
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from allocator.blocks import BlockStream  # noqa: E402
from allocator.blocks.calibration import calibration_from_text  # noqa: E402
from allocator.blocks.calibration.calibration_run import CalibrationRun  # noqa: E402
from allocator.blocks.gradients import fill_gradients  # noqa: E402
from allocator.blocks.hidden_states import HiddenStates  # noqa: E402
from allocator.contract.bank import BANK_NAME, ModelReference  # noqa: E402
from allocator.contract.layout import ModuleFormat  # noqa: E402
from allocator.model import CandidateFormats, model_digest, read_inventory  # noqa: E402
from allocator.quantize import BankReader, build_bank, get_quantizer  # noqa: E402
from allocator.quantize.block_learning import mean_metric  # noqa: E402
from allocator.quantize.block_statistics import see_both_sides  # noqa: E402
from allocator.quantize.kfac import Kfac  # noqa: E402
from allocator.quantize.learned_rounding import Candidate, LearnedRounding  # noqa: E402
from allocator.quantize.quantizer import InputStatistics, QuantizedModule  # noqa: E402
from allocator.quantize.reconstruction import Reconstruction  # noqa: E402
from allocator.run.journal import Journal  # noqa: E402
from allocator.run.process_group import ALONE as ONE_PROCESS  # noqa: E402
from benchmarks.quantizers.bench import HELD_OUT, LEARNED_ON, LENGTH, REFERENCE, SEED  # noqa: E402
from benchmarks.record import claim, write_result  # noqa: E402

WIDTHS = (2, 3)
PROBES, MIXES, BLOCK, ITERATIONS = 4, 8, 4, 100
MIXED, ALONE = "learned in mixes", "learned one by one"
KINDS = (
    "gptq",
    "learned together",
    MIXED,
    ALONE,
    "kfac:passes=0",
    "kfac",
    "kfac:damping=0.1",
    "kfac:damping=0.1,passes=8",
)
Weights = dict[tuple[str, int], Tensor]
"""By name in the block and width."""


@dataclass
class Mixed:
    """A reconstruction that is given candidates at every width, called NAME@BITS, and takes one of each module at
    random at every step."""

    task: Reconstruction
    choose: random.Random = field(default_factory=lambda: random.Random(0))

    def __getattr__(self, name: str) -> object:
        return getattr(self.task, name)

    def loss(self, weights: dict[str, Tensor], sequences: Sequence[int]) -> float:
        mixes = [self._mix(weights, random.Random(seed)) for seed in range(4)]
        return sum(self.task.loss(self._named(weights, mix), sequences) for mix in mixes) / len(mixes)

    def gradient(self, weights: dict[str, Tensor], sequences: Sequence[int]) -> tuple[float, dict[str, Tensor]]:
        mix = self._mix(weights, self.choose)
        loss, gradients = self.task.gradient(self._named(weights, mix), sequences)
        found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        return loss, found | {of: gradients[name] for name, of in mix.items()}

    def _mix(self, weights: dict[str, Tensor], choose: random.Random) -> dict[str, str]:
        modules = sorted({name.partition("@")[0] for name in weights})
        return {f"{m}.weight": f"{m}@{choose.choice(WIDTHS)}.weight" for m in modules}

    def _named(self, weights: dict[str, Tensor], mix: dict[str, str]) -> dict[str, Tensor]:
        return {name: weights[of] for name, of in mix.items()}


class Laboratory:
    def __init__(self, work: Path, index: int) -> None:
        model, text = REFERENCE
        inventory = read_inventory(model)
        self.stream, self.index, self.prefix = BlockStream(inventory), index, inventory.block_prefix(index)
        content, files = text.read_text(), [work / "calibration.txt", work / "held-out.txt"]
        for path, half in zip(files, (content[: len(content) // 2], content[len(content) // 2 :]), strict=True):
            path.write_text(half)
        text_ids = calibration_from_text(model, [files[0]], LEARNED_ON, LENGTH, SEED)
        held = calibration_from_text(model, [files[1]], HELD_OUT, LENGTH, SEED).token_ids
        hidden = HiddenStates(work / "hidden", *text_ids.token_ids.shape, inventory.shape.hidden_size)
        self.run = CalibrationRun(self.stream, text_ids, hidden)
        if not (work / "bank" / BANK_NAME).exists():
            reference = ModelReference(
                name=model.name, architecture=inventory.architecture, digest=model_digest(inventory)
            )
            build_bank(self.run, reference, get_quantizer("gptq"), CandidateFormats(WIDTHS, 128), work / "bank")
        stores = [hidden.beside(f"g{n}", torch.bfloat16) for n in range(PROBES)]
        if not (stores[-1].folder / "states-0001.bf16").exists():
            fill_gradients(self.stream, hidden, stores, 7_368_787)
        self.block, bank = self.stream.block(index), BankReader(work / "bank")
        metric = mean_metric(stores, index + 1, self.stream.device, ONE_PROCESS)
        self.task = Reconstruction(self.stream, self.block, index, hidden, hidden, stores, metric, 0.3)
        self.start: dict[tuple[str, int], Candidate] = {}
        for name in [m.name for m in inventory.modules if m.block == index]:
            for form in bank.formats(name):
                if form.num_bits in WIDTHS:
                    self.start[name.removeprefix(self.prefix), form.num_bits] = self._candidate(bank, name, form)
        self.names = sorted({name for name, _ in self.start})
        with torch.inference_mode():
            states = self.stream.embed(held)
            for number in range(self.stream.blocks):
                if number == index:
                    self.before = states
                states = self._through(number, states, {})
            self.head = self.stream.head()
            self.original = [self.head(rows[:, :-1]).log_softmax(-1) for rows in states.split(8)]

    def _candidate(self, bank: BankReader, name: str, form: ModuleFormat) -> Candidate:
        weight = self.block.get_parameter(f"{name.removeprefix(self.prefix)}.weight").data
        return Candidate(weight, form, QuantizedModule.unpacked(bank.tensors(name, form), form.num_bits))

    def _through(self, number: int, states: Tensor, weights: dict[str, Tensor]) -> Tensor:
        block = self.stream.block(number)
        return torch.cat([self.stream.run(block, rows, weights) for rows in states.split(16)])

    def kl(self, weights: Weights, widths: Mapping[str, int]) -> float:
        with torch.inference_mode():
            states = self._through(self.index, self.before, {f"{n}.weight": weights[n, b] for n, b in widths.items()})
            for number in range(self.index + 1, self.stream.blocks):
                states = self._through(number, states, {})
            total = 0.0
            for rows, original in zip(states.split(8), self.original, strict=True):
                ours = self.head(rows[:, :-1]).log_softmax(-1)
                total += float((original.exp() * (original - ours)).sum(-1).mean()) * len(rows)
            return total / len(states)

    def statistics(self) -> dict[str, InputStatistics]:
        """What `kfac` is told, by module."""
        names = [self.prefix + name for name in self.names]
        seen = see_both_sides(self.run, self.task.gradients, self.index, names, Journal.nowhere())
        return {name: known for name in self.names if (known := seen.take(self.prefix + name)) is not None}

    def learned(self, kind: str) -> Weights:
        """`kind`: gptq, a spec of kfac, or what is learned in ITERATIONS steps for each candidate."""
        found: dict[tuple[str, int], QuantizedModule] = {}
        if kind == "gptq":
            found = {key: candidate.quantized for key, candidate in self.start.items()}
        elif kind.startswith("kfac"):
            quantizer, statistics = get_quantizer(kind), self.statistics()
            assert isinstance(quantizer, Kfac)
            for name in self.names:
                of_module = [self.start[name, bits] for bits in WIDTHS]
                scales, formats = of_module[0].quantized.scale.dtype, [c.form for c in of_module]
                made = quantizer.quantize_together(of_module[0].weight, formats, scales, statistics[name].of_segment(0))
                found |= {(name, bits): module for bits, module in zip(WIDTHS, made, strict=True)}
        elif kind == MIXED:
            start = {f"{name}@{bits}": candidate for (name, bits), candidate in self.start.items()}
            rounding = LearnedRounding(iterations=ITERATIONS * len(WIDTHS))
            learned = rounding.learn(Mixed(self.task), start, 1).modules  # type: ignore[arg-type]
            found = {(name.partition("@")[0], int(name.partition("@")[2])): m for name, m in learned.items()}
        else:
            parts = [[name] for name in self.names] if kind == ALONE else [self.names]
            for bits in WIDTHS:
                for names in parts:
                    start = {name: self.start[name, bits] for name in names}
                    learned = LearnedRounding(iterations=ITERATIONS).learn(self.task, start, bits).modules
                    found |= {(name, bits): module for name, module in learned.items()}
        return {(name, bits): module.dequantized(bits) for (name, bits), module in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "bench-out" / "mixes", help="keeps states and gptq's bank")
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    laboratory = Laboratory(work, BLOCK)
    drawn = random.Random(1)
    mixes = [{name: drawn.choice(WIDTHS) for name in laboratory.names} for _ in range(MIXES)]
    plans = {f"all at {bits}": [dict.fromkeys(laboratory.names, bits)] for bits in WIDTHS} | {"mixes": mixes}
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        begun = time.process_time()
        weights = laboratory.learned(kind)
        row: dict[str, Any] = {"candidates": kind, "cpu_seconds": round(time.process_time() - begun, 1)}
        kl = {name: sum(laboratory.kl(weights, plan) for plan in of) / len(of) for name, of in plans.items()}
        first = rows[0] if rows else kl
        rows.append(row | kl | {f"{name}, of gptq's": round(kl[name] / first[name], 4) for name in plans})
        print(rows[-1], flush=True)
    by_kind = {row["candidates"]: row for row in rows}
    claims = []
    for plan in plans:
        value = by_kind["kfac"][f"{plan}, of gptq's"]
        claims.append(
            claim(
                f"KL of kfac's candidates over that of gptq's, block {BLOCK} of ref-7m, {plan}", value, "< 1", value < 1
            )
        )
    print(write_result("mixes", "make bench-mixes", [SEED, 1], rows, claims).relative_to(ROOT))


if __name__ == "__main__":
    main()
