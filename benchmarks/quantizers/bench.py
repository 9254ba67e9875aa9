"""The quantizers against each other: KL from the original with all modules of all blocks at one width."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from allocator.blocks import BlockStream  # noqa: E402
from allocator.blocks.calibration import Calibration, calibration_from_model, calibration_from_text  # noqa: E402
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
REFERENCE = (DATA / "models" / "ref-7m", DATA / "text" / "books.valid.txt")
QUANTIZERS = ("rtn", "mse", "gptq", "gptq:damping=0.1")
WIDTHS, GROUPS = (2, 3, 4), (64, 128)
SEQUENCES, HELD_OUT, LENGTH, SEED = 32, 48, 256, 0

LEARNED = ("gptq", "kfac", "learned-rounding")
FRESH = DATA / "text" / "wikitext2.valid.raw"
"""What learned rounding is measured on: its loss and its rate at 2 bits were chosen on windows of the other text."""
AUTOROUND, AUTOROUND_PYTHON = "auto-round 0.16.1", "GAMMA_AUTOROUND_PYTHON"
LEARNED_ON, LEARNED_GROUP = 340, 128
"""Sequences: the tokens that a model of ref-7m's size is calibrated on by default, here too in sequences of 256."""
WANTED = {2: 0.55, 3: 0.75, 4: 0.85}
"""By width, at most so much of gptq's KL."""


def run(name: str, folder: Path, text: Path | None, work: Path) -> list[dict[str, Any]]:
    """The rows of one model."""
    if text is not None:
        calibration, held_out = _texts(folder, text, work, SEQUENCES)
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


def learned_rows(name: str, folder: Path, text: Path, spec: str, work: Path) -> list[dict[str, Any]]:
    """One quantizer at all widths, on as much text as is calibrated on by default; `spec` may be auto-round."""
    calibration, chosen_on = _texts(folder, text, work, LEARNED_ON)
    fresh = calibration_from_text(folder, [FRESH], HELD_OUT, LENGTH, SEED).token_ids
    measure = _auto_round if spec == AUTOROUND else _ours
    rows = []
    for width, (kl, kl_chosen_on), seconds in measure(folder, calibration, [fresh, chosen_on], spec, work):
        print(f"  {name} group {LEARNED_GROUP} {spec} {width} bits: KL {kl:.5f}", flush=True)
        rows.append({
            "model": name, "quantizer": spec, "group_size": LEARNED_GROUP, "num_bits": width, "text": FRESH.name,
            "kl": kl, "kl_on_books": kl_chosen_on, "calibration_tokens": LEARNED_ON * LENGTH,
            "cpu_seconds": round(seconds, 1),
        })  # fmt: skip
    return rows


def _texts(folder: Path, text: Path, work: Path, sequences: int) -> tuple[Calibration, torch.Tensor]:
    """Calibration and held-out sequences, of the two halves of `text`."""
    content = text.read_text()
    halves = [work / "calibration.txt", work / "held-out.txt"]
    for path, part in zip(halves, (content[: len(content) // 2], content[len(content) // 2 :]), strict=True):
        path.write_text(part)
    calibration = calibration_from_text(folder, [halves[0]], sequences, LENGTH, SEED)
    return calibration, calibration_from_text(folder, [halves[1]], HELD_OUT, LENGTH, SEED).token_ids


Measured = tuple[int, list[float], float]
"""A width, its KL on each of the texts, and CPU seconds."""


def _ours(
    folder: Path, calibration: Calibration, texts: list[torch.Tensor], spec: str, work: Path
) -> Iterator[Measured]:
    """Seconds are a third of those of the bank, which has three widths: they share what is known of the inputs and of
    the gradients."""
    inventory = read_inventory(folder)
    reference = ModelReference(name=folder.name, architecture=inventory.architecture, digest=model_digest(inventory))
    hidden = HiddenStates(work / "hidden", *calibration.token_ids.shape, inventory.config["hidden_size"])
    stream, start = BlockStream(inventory), time.process_time()
    formats = CandidateFormats(WIDTHS, LEARNED_GROUP)
    build_bank(CalibrationRun(stream, calibration, hidden), reference, get_quantizer(spec), formats, work / "bank")
    seconds, bank = (time.process_time() - start) / len(WIDTHS), BankReader(work / "bank")
    blocks = [m.name for m in inventory.modules if m.block is not None and m.name in bank.bank.modules]
    for number, width in enumerate(WIDTHS):
        plan = {module: bank.formats(module)[number] for module in blocks}
        yield width, [float(Student(stream, bank, text).losses(plan).kl.mean()) for text in texts], seconds


def _auto_round(
    folder: Path, calibration: Calibration, texts: list[torch.Tensor], _spec: str, work: Path
) -> Iterator[Measured]:
    """Seconds are those of the real `auto-round`, which has an environment of its own, at each width."""
    torch.save(calibration.token_ids, work / "tokens.pt")
    script, weights = Path(__file__).with_name("autoround.py"), work / "weights.safetensors"
    for width in WIDTHS:
        command = [os.environ[AUTOROUND_PYTHON], script, folder, "--tokens", work / "tokens.pt", "--bits", str(width)]
        done = subprocess.run([*command, "--out", weights], check=True, capture_output=True, text=True)
        seconds = json.loads(done.stdout.splitlines()[-1])["cpu_seconds"]
        yield width, [weights_kl(folder, weights, text) for text in texts], seconds


def weights_kl(folder: Path, weights: Path, held_out: torch.Tensor) -> float:
    """KL of the model with `weights` in the place of its own."""
    original, changed = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    changed.load_state_dict(load_file(weights), strict=False)
    return measure_divergence(original, changed, held_out).kl


def all_learned_rows(name: str, folder: Path, text: Path, kept: Path) -> list[dict[str, Any]]:
    """Rows of all quantizers of `LEARNED`, those of each kept in `kept` when they are done; those of auto-round where
    it is at hand, or kept."""
    rows = []
    for spec in (*LEARNED, AUTOROUND):
        saved = kept / f"learned-{spec.replace(' ', '-')}.json"
        if not saved.exists() and (spec != AUTOROUND or AUTOROUND_PYTHON in os.environ):
            with tempfile.TemporaryDirectory() as work:
                saved.write_text(json.dumps(learned_rows(name, folder, text, spec, Path(work))))
        if saved.exists():
            rows += json.loads(saved.read_text())
    return rows


def learned_claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What learning is to be worth, by width, on both texts."""
    by_width = {(r["quantizer"], r["num_bits"]): r for r in rows}
    claims = []
    for key, text in (("kl", "WikiText-2"), ("kl_on_books", "books, on which its loss was chosen")):
        for width, most in WANTED.items():
            about = f"ref-7m, {text}, {width} bits"
            ratio = by_width["kfac", width][key] / by_width["gptq", width][key]
            claims.append(claim(f"KL of kfac over that of gptq, {about}", ratio, "< 1", ratio < 1))
            if (AUTOROUND, width) in by_width:
                ratio = by_width["kfac", width][key] / by_width[AUTOROUND, width][key]
                why = None if ratio < 1 else "AutoRound learns a block's modules together, at the one width of all"
                claims.append(claim(f"KL of kfac over that of {AUTOROUND}, {about}", ratio, "< 1", why is None, why))
            learned = by_width["learned-rounding", width][key]
            ratio = learned / by_width["gptq", width][key]
            why = None if ratio <= most else "calibrated on books: less is gained on text of another kind"
            claims.append(
                claim(f"KL of learned-rounding over that of gptq, {about}", ratio, f"<= {most}", why is None, why)
            )
            if (AUTOROUND, width) in by_width:
                ratio = learned / by_width[AUTOROUND, width][key]
                why = None if ratio < 1 else "AutoRound gives each block the states of the quantized ones before it"
                claims.append(claim(f"the same over that of {AUTOROUND}, {about}", ratio, "< 1", why is None, why))
    seconds = {q: sum(r["cpu_seconds"] for r in rows if r["quantizer"] == q) for q in ("learned-rounding", AUTOROUND)}
    if seconds[AUTOROUND]:
        ratio = seconds["learned-rounding"] / seconds[AUTOROUND]
        text = f"CPU seconds of learned-rounding, gptq and gradients included, over those of {AUTOROUND}'s rounding"
        claims.append(claim(f"{text}, three widths", ratio, "<= 1", ratio <= 1, None if ratio <= 1 else "more steps"))
    spent = {q: sum(r["cpu_seconds"] for r in rows if r["quantizer"] == q) for q in ("kfac", "gptq")}
    ratio = spent["kfac"] / spent["gptq"]
    claims.append(
        claim("CPU seconds of candidates by kfac over those by gptq, three widths", ratio, "<= 8", ratio <= 8)
    )
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one model; its rows are kept for the call that has all")
    parser.add_argument("--folder", type=Path, default=ROOT / "bench-out" / "quantizers")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    models: dict[str, tuple[Path, Path | None]] = {"demo": (ROOT / "benchmarks" / "demo" / "model", None)}
    if REFERENCE[0].is_dir():
        models["ref-7m"] = REFERENCE
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
    if "ref-7m" in models:
        learned = all_learned_rows("ref-7m", *REFERENCE, args.folder)
        rows, claims = rows + learned, claims + learned_claims(learned)
    for c in claims:
        print(c)
    print(write_result("quantizers", "make bench-quantizers", [SEED], rows, claims).relative_to(ROOT))


if __name__ == "__main__":
    main()
