"""What each level of `--effort` costs and brings: KL at several budgets after `gamma learn`, `solve` and `tune`.

    python benchmarks/quantizers/effort.py --only ref-7m

Candidates are made, and tuned, on the amount of text that `gamma fit` takes by default; scores are measured on
`SCORED` sequences of it, and their seconds are those of all (their time goes with the text). What is done is kept in
--folder. Not a part of `make bench-quantizers`: an hour on two cores.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from allocator.blocks import BlockStream  # noqa: E402
from allocator.blocks.calibration import calibration_amount, calibration_from_model, calibration_from_text  # noqa: E402
from allocator.blocks.calibration.calibration_run import CalibrationRun  # noqa: E402
from allocator.blocks.hidden_states import HiddenStates  # noqa: E402
from allocator.contract.bank import BANK_NAME, ModelReference  # noqa: E402
from allocator.contract.scores import Scores  # noqa: E402
from allocator.evaluate import Student  # noqa: E402
from allocator.model import CandidateFormats, model_digest, read_inventory  # noqa: E402
from allocator.pipeline import SolveSettings, solve_scores  # noqa: E402
from allocator.pipeline.effort import EFFORTS  # noqa: E402
from allocator.pipeline.tuning import TuneRequest, tune  # noqa: E402
from allocator.quantize import BankReader, build_bank, get_quantizer  # noqa: E402
from allocator.score import LearningSettings, learn_scores  # noqa: E402
from benchmarks.quantizers.bench import FRESH, HELD_OUT, REFERENCE, SEED  # noqa: E402

BUDGETS = (2.5, 3.0, 4.0)
SCORED = 64


class Laboratory:
    """One model: its calibration text, the text that is measured on, and a folder for what is made."""

    def __init__(self, model: Path, text: Path | None, folder: Path) -> None:
        self.model, self.folder = model, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.inventory = read_inventory(model)
        sequences, length = calibration_amount(self.inventory.parameters, self.inventory.positions, None, None)
        self.text = folder / "text.txt"
        if text is None:
            self.calibration = calibration_from_model(model, sequences, length, SEED)
            self.held_out = calibration_from_model(model, HELD_OUT, length, SEED + 1).token_ids
            self.tuned_on = None
        else:
            self.text.write_text(text.read_text()[: text.stat().st_size // 2])
            self.calibration = calibration_from_text(model, [self.text], sequences, length, SEED)
            self.held_out = calibration_from_text(model, [FRESH], HELD_OUT, length, SEED).token_ids
            self.tuned_on = [self.text]
        self.stream = BlockStream(self.inventory)

    def run(self, sequences: int | None = None) -> CalibrationRun:
        text = self.calibration
        text = replace(text, token_ids=text.token_ids[:sequences])
        name = "hidden" if sequences is None else f"hidden-{sequences}"
        hidden = HiddenStates(self.folder / name, *text.token_ids.shape, self.inventory.shape.hidden_size)
        return CalibrationRun(self.stream, text, hidden)

    def bank(self, spec: str) -> tuple[Path, float]:
        """The bank of a quantizer, and its CPU seconds."""
        bank = self.folder / spec.replace(":", "-") / "bank"
        seconds = bank.parent / "bank.txt"
        if not (bank / BANK_NAME).exists():
            model = ModelReference(
                name=self.model.name, architecture=self.inventory.architecture, digest=model_digest(self.inventory)
            )
            begun = time.process_time()
            build_bank(self.run(), model, get_quantizer(spec), CandidateFormats((2, 3, 4, 5, 6, 8), 128), bank)
            seconds.write_text(str(time.process_time() - begun))
        return bank, float(seconds.read_text())

    def scores(self, spec: str) -> tuple[Scores, float]:
        """The scores of a bank, and the CPU seconds that they take on all of the text."""
        bank, _ = self.bank(spec)
        path, seconds = bank.with_name("scores.json"), bank.with_name("scores.txt")
        if not path.exists():
            run = self.run(SCORED)
            begun = time.process_time()
            run.fill()
            learn_scores(run, BankReader(bank), LearningSettings()).write(path)
            share = len(self.calibration.token_ids) / SCORED
            seconds.write_text(str((time.process_time() - begun) * share))
        return Scores.read(path), float(seconds.read_text())

    def kl(self, bank: Path, modules: Any) -> float:
        student = Student(self.stream, BankReader(bank), self.held_out, hold_bytes=1 << 30)
        return float(student.losses(modules).kl.mean())

    def level(self, name: str) -> dict[str, Any]:
        effort = EFFORTS[name]
        (bank, of_bank), (scores, of_scores) = self.bank(effort.quantizer), self.scores(effort.quantizer)
        row: dict[str, Any] = {
            "model": self.model.name, "effort": name, "quantizer": effort.quantizer,
            "cpu_seconds_candidates": round(of_bank), "cpu_seconds_scores": round(of_scores), "kl": {},
        }  # fmt: skip
        for bits in BUDGETS:
            manifest, folder = solve_scores(scores, SolveSettings(average_bits=bits)), bank
            if effort.tune:
                out = self.folder / f"tuned-{bits}"
                begun = time.process_time()
                request = TuneRequest(manifest, self.model, bank, self.tuned_on, out)
                manifest = tune(request)
                row["cpu_seconds_tuning"] = round(time.process_time() - begun)
                assert manifest.tuning is not None
                row.setdefault("tuning", {})[str(bits)] = manifest.tuning.model_dump(mode="json")
                folder = out / "bank" if manifest.tuning.kept != "candidates" else bank
            row["kl"][str(bits)] = self.kl(folder, manifest.modules)
            print(name, bits, row["kl"][str(bits)], row.get("tuning", {}).get(str(bits)), flush=True)
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["ref-7m", "demo"], default="ref-7m")
    parser.add_argument("--levels", default=",".join(EFFORTS))
    parser.add_argument("--folder", type=Path, default=ROOT / "bench-out" / "effort")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, text = REFERENCE if args.only == "ref-7m" else (ROOT / "benchmarks" / "demo" / "model", None)
    laboratory = Laboratory(model, text, args.folder / args.only)
    for name in args.levels.split(","):
        kept = args.folder / f"{args.only}-{name}.json"
        if not kept.exists():
            kept.write_text(json.dumps(laboratory.level(name), indent=1))
        print(kept.read_text())


if __name__ == "__main__":
    main()
