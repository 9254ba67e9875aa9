"""Rows of GAMMA: learned once, solved and exported as the product does, measured from the exported checkpoint."""

import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allocator.blocks.calibration import calibration_from_text
from allocator.contract.documents import write_atomically
from allocator.contract.errors import InfeasibleBudgetError, InputError
from allocator.contract.manifest import Manifest
from allocator.contract.safetensors_file import read_folder_headers
from allocator.contract.scores import Scores
from allocator.evaluate.dequantized import load_dequantized
from allocator.evaluate.verification import uniform_assignments
from allocator.pipeline import export
from allocator.pipeline.model_folder import digest_of_model
from allocator.pipeline.tuning import TUNED_MANIFEST
from allocator.run.progress import silent
from allocator.run.work_folder import RUN_NAME, RunFingerprint
from allocator.solve import SolveSettings, budget_for_average_bits, solve_scores
from allocator.solve.units import NO_RULES, Rules
from benchmarks.real_models.cells import OFF_GRID, Bench, Quantized
from benchmarks.real_models.process import NO_COST, UNKNOWN_COST, Cost, run_gamma, sum_of
from benchmarks.real_models.sizes import Sizes, sizes_of

__all__ = [
    "CANDIDATES",
    "GAMMA",
    "GPTQ",
    "KFAC",
    "LEARNED",
    "TUNED",
    "VOCABULARY_AT_8",
    "Candidates",
    "Ours",
    "folder_sizes",
    "kind_of",
]

GAMMA = "gamma"
VOCABULARY_AT_8 = ", vocabulary at 8"
_ALL_BYTES = str(1 << 60)
_UNIFORM = (2, 3, 4)
_VOCABULARY_BITS = 8


@dataclass(frozen=True)
class Candidates:
    """What GAMMA chooses among: `suffix` ends the names of its rows, `folder` has bank and scores; with `tuned`
    what it has chosen is learned anew."""

    name: str
    quantizer: str
    folder: str
    suffix: str
    tuned: bool = False


GPTQ = Candidates("gptq", "gptq", "work", "")
KFAC = Candidates("kfac", "kfac", "work-kfac", ", kfac candidates")
TUNED = Candidates("tuned", "kfac", "work-kfac", ", tuned", tuned=True)
LEARNED = Candidates("learned", "learned-rounding", "work-learned", ", learned candidates")
CANDIDATES = {kind.name: kind for kind in (GPTQ, KFAC, TUNED, LEARNED)}


def kind_of(row: str) -> Candidates:
    """Of a row of GAMMA, by its name."""
    return next((kind for kind in CANDIDATES.values() if kind.suffix and row.endswith(kind.suffix)), GPTQ)


def folder_sizes(bench: Bench, folder: Path) -> Sizes:
    """Of a Hugging Face checkpoint of the model, whatever its format."""
    tensors = {name: tensor.nbytes for name, tensor in read_folder_headers(folder).items()}
    files = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return sizes_of(tensors, files, bench.weights, bench.model.tied)


class Ours:
    """Bank and scores of one model in a folder of `bench.work`; `text` and `amount` (sequences, length) are what is
    learned on, `tune_with` the arguments of `gamma tune`."""

    def __init__(
        self,
        bench: Bench,
        text: Path,
        amount: tuple[int, int],
        candidates: Candidates = GPTQ,
        tune_with: Sequence[str] = (),
    ) -> None:
        self.bench, self.text, self.amount, self.candidates = bench, text, amount, candidates
        self.tune_with = tune_with
        self.work = bench.work / candidates.folder
        self.record = bench.work / f"{candidates.folder.replace('work', 'learning')}.json"

    def learn(self, method: str = GAMMA, *more: str) -> None:
        """By `gamma learn` with its defaults but for the amount of text, the quantizer and `more`.

        What a finished run has left is used as it is, whoever started it; rows say what it was learned on. Raises
        InputError if it is of another model or quantizer: hours of work are not deleted by the way.
        """
        if self._finished(method):
            return
        command = ["learn", str(self.bench.folder), "--calibration", str(self.text), "--out", str(self.work)]
        command += ["--sequences", str(self.amount[0]), "--sequence-length", str(self.amount[1])]
        command += ["--quantizer", self.candidates.quantizer, "--method", method, *more]
        cost = run_gamma(*command)
        if method == GAMMA:
            write_atomically(self.record, json.dumps(cost.record()))

    def _finished(self, method: str) -> bool:
        """Whether scores of `method`, or those of GAMMA, which serve for all, are there."""
        if not (self.work / RUN_NAME).exists():
            return False
        run = RunFingerprint.read(self.work / RUN_NAME)
        quantizer, digest = str(run.candidates["quantizer"]), digest_of_model(self.bench.inventory, self.work, silent)
        if quantizer.partition(":")[0] != self.candidates.quantizer or run.model.digest != digest:
            raise InputError(
                f"{self.work} holds candidates by {quantizer} of the model {run.model.digest}; wanted are those by "
                f"{self.candidates.quantizer} of {digest}; move the folder away, or give another --work"
            )
        if (found := self.learned_on) != self.amount:
            print(f"{self.work}: on {found[0]} sequences of {found[1]} tokens, used as it is", flush=True)
        return (self.work / "scores.json").exists() and self.scores.method in (method, GAMMA)

    @property
    def learned_on(self) -> tuple[int, int]:
        """Sequences and length of the run that is there."""
        text = RunFingerprint.read(self.work / RUN_NAME).calibration
        return text["sequences"], text["sequence_length"]

    def calibration(self) -> Tensor:
        """The text that is learned on, int64 `[sequences, length]`."""
        return calibration_from_text(self.bench.folder, [self.text], *self.amount, seed=0).token_ids

    def _learned(self) -> Cost:
        """Of the run that learned, if it was this benchmark that ran it."""
        return Cost(**json.loads(self.record.read_text())) if self.record.exists() else UNKNOWN_COST

    @property
    def scores(self) -> Scores:
        return Scores.read(self.work / "scores.json")

    def budgets(self, bits: Sequence[float], pinned: bool = False) -> dict[float, int | None]:
        """Bytes of all tensors at each of the average bits, of all modules or, where the vocabulary is `pinned` at 8
        bits, of those in blocks; None where the narrowest candidates are wider."""
        scores = self._pinned() if pinned else self.scores
        found: dict[float, int | None] = {}
        for wanted in bits:
            try:
                found[wanted] = budget_for_average_bits(scores, wanted)
            except InfeasibleBudgetError:
                found[wanted] = None
        return found

    def _pinned(self) -> Scores:
        """The scores with one candidate of embedding and lm_head: what has no choice counts apart from the average."""
        scores = self.scores
        modules = dict(scores.modules)
        for name in self._vocabulary():
            only = [c for c in modules[name].candidates if c.format.num_bits == _VOCABULARY_BITS]
            modules[name] = modules[name].model_copy(update={"candidates": only})
        return scores.model_copy(update={"modules": modules})

    def gamma(self, name: str, budget_bytes: int, pins: Mapping[str, int] | None = None, **more: Any) -> dict[str, Any]:
        """The row of GAMMA's assignment for a budget of all tensors; `name` without what ends the names of these
        candidates."""
        if self.scores.method != GAMMA:
            raise ValueError(f"{self.work}: the scores are those of {self.scores.method}")
        more |= {"learned_on": list(self.learned_on)}
        rules = NO_RULES if pins is None else Rules(pins=dict(pins))
        digest, with_tasks = self.scores.digest, "bits" in more and pins is None
        return self._row(name, str(budget_bytes), rules, digest, self._learned(), more, with_tasks)

    def gamma_beside_8_bits(self, bits: float, budget_bytes: int) -> dict[str, Any]:
        """The row of an assignment of the blocks alone, the vocabulary being at 8 bits."""
        pins = {name: _VOCABULARY_BITS for name in self._vocabulary()}
        return self.gamma(f"gamma {bits}{VOCABULARY_AT_8}", budget_bytes, pins, bits=bits)

    def floor(self) -> None:
        """The row of the original with its arithmetic in bfloat16: differences below it are noise."""
        folder = self.bench.folder
        self.bench.cell(
            "the original in bfloat16",
            lambda: Quantized(self.bench.load(folder, torch.bfloat16), folder_sizes(self.bench, folder), NO_COST),
        )

    def uniform(self) -> None:
        """The candidates at one width, with the vocabulary at the same and at 8 bits."""
        for bits in _UNIFORM:
            self._uniform(f"uniform {bits}", {"*": bits})
            pins = {"model.layers.*": bits} | {name: _VOCABULARY_BITS for name in self._vocabulary()}
            self._uniform(f"uniform {bits}{VOCABULARY_AT_8}", pins, with_tasks=False)

    def off_grid(self, bits: int = 4) -> None:
        """The row of uniform `bits` for the model with its weights off the grid of the file that they come from."""
        name = f"uniform {bits}{OFF_GRID}"
        if self.bench.wants(name) and not self.bench.path(name).exists():
            ours = Ours(self.bench.off_grid, self.text, self.amount)
            ours.learn("uniform", "--widths", f"{bits},16")
            ours._uniform(name, {"*": bits})
            self.bench.take_off_grid(name)

    def widest_uniform(self, budget_bytes: int) -> str | None:
        """The row of the widest uniform plan of so many bytes, measured now if it is new; None if none fits."""
        plans = uniform_assignments(self.scores, budget_bytes)
        if not plans:
            return None
        bits = max(form.num_bits for form in plans[0].values())
        self._uniform(f"uniform {bits}", {"*": bits})
        return f"uniform {bits}{self.candidates.suffix}"

    def _vocabulary(self) -> list[str]:
        modules = self.scores.modules
        return [name for name in modules if ".layers." not in name and len(modules[name].candidates) > 1]

    def _uniform(self, name: str, pins: dict[str, int], with_tasks: bool = True) -> None:
        more: dict[str, Any] = {"learned_on": list(self.learned_on)}
        if not self.candidates.tuned:
            more["rival"] = f"uniform {self.candidates.quantizer}"
        bank, with_tasks = self.scores.bank_digest, with_tasks and not name.endswith(OFF_GRID)
        self._row(name, _ALL_BYTES, Rules(pins=pins), bank, UNKNOWN_COST, more, with_tasks)  # the bank's alone

    def _row(
        self, name: str, budget: str, rules: Rules, source: str, cost: Cost, more: dict[str, Any], with_tasks: bool
    ) -> dict[str, Any]:
        full_name = f"{name}{self.candidates.suffix}"

        def make() -> Quantized:
            begun, bank, spent = time.process_time(), self.work / "bank", [cost]
            manifest = solve_scores(self.scores, SolveSettings(budget=budget, rules=rules))
            tuned = self.bench.work / "tuned" / self.bench.path(full_name).stem
            if self.candidates.tuned:
                spent.append(self._tune(manifest, tuned))
                more["tuning_cpu_seconds"] = spent[-1].record()["cpu_seconds"]
                manifest = Manifest.read(tuned / TUNED_MANIFEST)
                bank = bank if manifest.bank_digest == self.scores.bank_digest else tuned / "bank"
            with tempfile.TemporaryDirectory(dir=self.bench.work) as place:
                folder = Path(place) / "checkpoint"
                export(manifest, self.bench.folder, bank, folder)
                seconds = time.process_time() - begun
                sizes, found = folder_sizes(self.bench, folder), load_dequantized(folder)
            shutil.rmtree(tuned, ignore_errors=True)
            more_of_all = {"solve_and_export_cpu_seconds": round(seconds, 2), "candidates": self.candidates.name}
            if manifest.tuning is not None:
                more_of_all["tuning"] = manifest.tuning.model_dump(exclude={"bank_digest", "text_digest"})
            return Quantized(found, sizes, sum_of(spent), more_of_all | more)

        if self.candidates.tuned:
            source = " ".join([source, *self.tune_with])
        return self.bench.cell(full_name, make, source, with_tasks)

    def _tune(self, manifest: Manifest, folder: Path) -> Cost:
        """By `gamma tune` with its defaults but for `tune_with`; a run that was stopped goes on."""
        path = folder.with_suffix(".json")
        folder.parent.mkdir(exist_ok=True)
        manifest.write(path)
        command = ["tune", str(path), "--model", str(self.bench.folder), "--bank", str(self.work / "bank")]
        command += ["--text", str(self.text), "--out", str(folder)]
        return run_gamma(*command, *self.tune_with)
