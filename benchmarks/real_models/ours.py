"""Rows of GAMMA: learned once, solved and exported as the product does, measured from the exported checkpoint."""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allocator.blocks.calibration import calibration_from_text
from allocator.contract.documents import write_atomically
from allocator.contract.errors import InfeasibleBudgetError
from allocator.contract.safetensors_file import read_folder_headers
from allocator.contract.scores import Scores
from allocator.evaluate.dequantized import load_dequantized
from allocator.evaluate.verification import uniform_assignments
from allocator.pipeline import export
from allocator.solve import SolveSettings, budget_for_average_bits, solve_scores
from allocator.solve.units import NO_RULES, Rules
from benchmarks.real_models.cells import OFF_GRID, Bench, Quantized
from benchmarks.real_models.process import NO_COST, Cost, run_gamma
from benchmarks.real_models.sizes import Sizes, sizes_of

__all__ = ["GAMMA", "Ours", "folder_sizes"]

GAMMA = "gamma"
_ALL_BYTES = str(1 << 60)
_UNIFORM = (2, 3, 4)
_VOCABULARY_BITS = 8


def folder_sizes(bench: Bench, folder: Path) -> Sizes:
    """Of a Hugging Face checkpoint of the model, whatever its format."""
    tensors = {name: tensor.nbytes for name, tensor in read_folder_headers(folder).items()}
    files = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return sizes_of(tensors, files, bench.weights, bench.model.tied)


class Ours:
    """bank and scores of one model in `bench.work`; `text` and `amount` (sequences, length) are what is learned on."""

    def __init__(self, bench: Bench, text: Path, amount: tuple[int, int]) -> None:
        self.bench, self.text, self.amount = bench, text, amount
        self.work = bench.work / "work"
        self.record = bench.work / "learning.json"

    def learn(self, method: str = GAMMA, *more: str) -> None:
        """By `gamma learn` with gptq's candidates (unless `more` has others) and this amount of text; what is there is
        used again."""
        command = ["learn", str(self.bench.folder), "--calibration", str(self.text), "--out", str(self.work)]
        command += [
            "--effort",
            "fast",
            "--sequences",
            str(self.amount[0]),
            "--sequence-length",
            str(self.amount[1]),
            "--method",
            method,
            *more,
        ]
        cost = run_gamma(*command)
        if method == GAMMA and (not self.record.exists() or cost.cpu_seconds > self._learned().cpu_seconds):
            write_atomically(self.record, json.dumps(cost.record()))

    def calibration(self) -> Tensor:
        """The text that is learned on, int64 `[sequences, length]`."""
        return calibration_from_text(self.bench.folder, [self.text], *self.amount, seed=0).token_ids

    def _learned(self) -> Cost:
        return Cost(**json.loads(self.record.read_text()))

    @property
    def scores(self) -> Scores:
        return Scores.read(self.work / "scores.json")

    def budgets(self, bits: Sequence[float]) -> dict[float, int | None]:
        """Bytes of all tensors at each of the average bits; None where the narrowest candidates are wider."""
        found: dict[float, int | None] = {}
        for wanted in bits:
            try:
                found[wanted] = budget_for_average_bits(self.scores, wanted)
            except InfeasibleBudgetError:
                found[wanted] = None
        return found

    def gamma(self, name: str, budget_bytes: int, **more: Any) -> dict[str, Any]:
        """The row of GAMMA's assignment for a budget of all tensors."""
        if self.scores.method != GAMMA:
            raise ValueError(f"{self.work}: the scores are those of {self.scores.method}")
        more |= {"learned_on": list(self.amount)}
        return self._row(name, str(budget_bytes), NO_RULES, self.scores.digest, self._learned(), more)

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
            self._uniform(f"uniform {bits}, vocabulary at {_VOCABULARY_BITS}", pins)

    def off_grid(self, bits: int = 4) -> None:
        """The row of uniform `bits` for the model with its weights off the grid of the file that they come from."""
        name = f"uniform {bits}{OFF_GRID}"
        if not self.bench.path(name).exists():
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
        return f"uniform {bits}"

    def _vocabulary(self) -> list[str]:
        modules = self.scores.modules
        return [name for name in modules if ".layers." not in name and len(modules[name].candidates) > 1]

    def _uniform(self, name: str, pins: dict[str, int]) -> None:
        bank = self.scores.bank_digest
        self._row(name, _ALL_BYTES, Rules(pins=pins), bank, NO_COST, {"rival": "uniform gptq"})

    def _row(
        self, name: str, budget: str, rules: Rules, source: str, cost: Cost, more: dict[str, Any]
    ) -> dict[str, Any]:
        def make() -> Quantized:
            begun = time.process_time()
            manifest = solve_scores(self.scores, SolveSettings(budget=budget, rules=rules))
            with tempfile.TemporaryDirectory(dir=self.bench.work) as place:
                folder = Path(place) / "checkpoint"
                export(manifest, self.bench.folder, self.work / "bank", folder)
                seconds = time.process_time() - begun
                sizes, found = folder_sizes(self.bench, folder), load_dequantized(folder)
            return Quantized(found, sizes, cost, {"solve_and_export_cpu_seconds": round(seconds, 2), **more})

        return self.bench.cell(name, make, source)
