"""The quantizers against each other: KL from the original with all modules of all blocks at one width."""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from allocator.blocks import BlockStream  # noqa: E402
from allocator.blocks.calibration import calibration_from_model, calibration_from_text  # noqa: E402
from allocator.blocks.calibration.calibration_run import CalibrationRun  # noqa: E402
from allocator.blocks.hidden_states import HiddenStates  # noqa: E402
from allocator.contract.bank import ModelReference  # noqa: E402
from allocator.evaluate import Student, measure_divergence  # noqa: E402
from allocator.model import CandidateFormats, model_digest, read_inventory  # noqa: E402
from allocator.quantize import (  # noqa: E402
    BankReader,
    build_bank,
    get_quantizer,
)
from benchmarks.record import claim, write_result  # noqa: E402

DATA = ROOT.parent / "shared" / "data"
QUANTIZERS = ("rtn", "mse", "gptq", "gptq:damping=0.1")
WIDTHS, GROUPS = (2, 3, 4), (64, 128)
SEQUENCES, HELD_OUT, LENGTH, SEED = 32, 48, 256, 0

LEARNED = ("gptq", "learned-rounding")
LEARNED_ON, LEARNED_GROUP = 340, 128
"""Sequences: the tokens that a model of ref-7m's size is calibrated on by default, here too in sequences of 256."""


def run(name: str, folder: Path, text: Path | None, work: Path) -> list[dict[str, Any]]:
    """The rows of one model."""
    if text is not None:
        content = text.read_text()
        halves = [work / "calibration.txt", work / "held-out.txt"]
        for path, part in zip(halves, (content[: len(content) // 2], content[len(content) // 2 :]), strict=True):
            path.write_text(part)
        calibration = calibration_from_text(folder, [halves[0]], SEQUENCES, LENGTH, SEED)
        held_out = calibration_from_text(folder, [halves[1]], HELD_OUT, LENGTH, SEED).token_ids
    else:
        calibration = calibration_from_model(folder, SEQUENCES, LENGTH, SEED)
        held_out = calibration_from_model(folder, HELD_OUT, LENGTH, SEED + 1).token_ids
    inventory = read_inventory(folder)
    reference = ModelReference(name=name, architecture=inventory.architecture, digest=model_digest(inventory))
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = []
    for group in GROUPS:
        for spec in QUANTIZERS:
            start = time.process_time()
            bank_folder = work / f"bank-{group}-{spec.replace(':', '-')}"
            hidden = HiddenStates(work / "hidden", SEQUENCES, LENGTH, inventory.config["hidden_size"])
            run = CalibrationRun(BlockStream(inventory), calibration, hidden)
            build_bank(run, reference, get_quantizer(spec), CandidateFormats(WIDTHS, group), bank_folder)
            seconds = time.process_time() - start
            bank = BankReader(bank_folder)
            for number, width in enumerate(WIDTHS):
                for module in (
                    m.name for m in inventory.modules if m.block is not None and m.name in bank.bank.modules
                ):
                    weight = bank.dequantized(module, bank.formats(module)[number])
                    student.get_parameter(f"{module}.weight").data.copy_(weight)
                kl = measure_divergence(original, student, held_out).kl
                rows.append({
                    "model": name, "quantizer": spec, "group_size": group, "num_bits": width, "kl": kl,
                    "cpu_seconds_of_all_widths": round(seconds, 1),
                })  # fmt: skip
                print(f"  {name} group {group} {spec} {width} bits: KL {kl:.4f}", flush=True)
    return rows


def learned_row(name: str, folder: Path, text: Path, spec: str, width: int, work: Path) -> dict[str, Any]:
    """One quantizer at one width, on as much text as is calibrated on by default."""
    content = text.read_text()
    halves = [work / "calibration.txt", work / "held-out.txt"]
    for path, part in zip(halves, (content[: len(content) // 2], content[len(content) // 2 :]), strict=True):
        path.write_text(part)
    calibration = calibration_from_text(folder, [halves[0]], LEARNED_ON, LENGTH, SEED)
    held_out = calibration_from_text(folder, [halves[1]], HELD_OUT, LENGTH, SEED).token_ids
    inventory = read_inventory(folder)
    reference = ModelReference(name=name, architecture=inventory.architecture, digest=model_digest(inventory))
    hidden = HiddenStates(work / "hidden", LEARNED_ON, LENGTH, inventory.config["hidden_size"])
    stream, start = BlockStream(inventory), time.process_time()
    build_bank(
        CalibrationRun(stream, calibration, hidden), reference, get_quantizer(spec),
        CandidateFormats((width,), LEARNED_GROUP), work / "bank",
    )  # fmt: skip
    seconds, bank = time.process_time() - start, BankReader(work / "bank")
    blocks = [m.name for m in inventory.modules if m.block is not None and m.name in bank.bank.modules]
    student = Student(stream, bank, held_out)
    kl = float(student.losses({module: bank.formats(module)[0] for module in blocks}).kl.mean())
    print(f"  {name} group {LEARNED_GROUP} {spec} {width} bits, {LEARNED_ON * LENGTH} tokens: KL {kl:.5f}", flush=True)
    return {
        "model": name, "quantizer": spec, "group_size": LEARNED_GROUP, "num_bits": width, "kl": kl,
        "calibration_tokens": LEARNED_ON * LENGTH, "cpu_seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one model; its rows are kept for the call that has all")
    parser.add_argument("--folder", type=Path, default=ROOT / "bench-out" / "quantizers")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    models: dict[str, tuple[Path, Path | None]] = {"demo": (ROOT / "benchmarks" / "demo" / "model", None)}
    if (DATA / "models" / "ref-7m").is_dir():
        models["ref-7m"] = (DATA / "models" / "ref-7m", DATA / "text" / "books.valid.txt")
    rows, missing = [], []
    for name, (folder, text) in models.items():
        saved = args.folder / f"{name}.json"
        if not saved.exists() and args.only in (None, name):
            with tempfile.TemporaryDirectory() as work:
                saved.write_text(json.dumps(run(name, folder, text, Path(work))))
        if saved.exists():
            rows += json.loads(saved.read_text())
        else:
            missing.append(name)
    if missing:
        print("not done yet:", ", ".join(missing))
        return
    kl = {(r["model"], r["quantizer"], r["group_size"], r["num_bits"]): r["kl"] for r in rows}
    claims = []
    for better, worse in (("mse", "rtn"), ("gptq", "mse")):
        ratio = max(kl[m, better, g, b] / kl[m, worse, g, b] for m in models for g in GROUPS for b in WIDTHS)
        text = f"KL of {better} over that of {worse}, the largest of all models, groups and widths"
        claims.append(claim(text, ratio, "< 1", ratio < 1, None if ratio < 1 else "see the rows"))
    for c in claims:
        print(c)
    print(write_result("quantizers", "make bench-quantizers", [SEED], rows, claims).relative_to(ROOT))


if __name__ == "__main__":
    main()
