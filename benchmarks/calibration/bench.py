"""How much calibration a small model needs: KL of what is solved from less text, over that from 128 sequences.

    make bench-calibration

Candidates and scores are learned from more and more tokens of text, with several seeds; at each of some budgets the
assignment is solved from them and measured on text that none has seen. Each cell is kept in WORK as it is done, so that
a stopped run goes on. Writes benchmarks/results/calibration.json.
"""

import argparse
import json
import lzma
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from allocator.blocks import BlockStream  # noqa: E402
from allocator.blocks.calibration import calibration_from_model, calibration_from_text  # noqa: E402
from allocator.contract.documents import write_atomically  # noqa: E402
from allocator.evaluate import Student  # noqa: E402
from allocator.model import Inventory, read_inventory  # noqa: E402
from allocator.pipeline import CandidateSettings, SolveSettings, learn, solve_scores  # noqa: E402
from allocator.quantize import BankReader  # noqa: E402
from allocator.score import LearningSettings  # noqa: E402
from benchmarks.record import claim, write_result  # noqa: E402

DATA = ROOT.parent / "shared" / "data"
WIDTHS, BITS = (2, 4, 16), (2.5, 3.0, 3.5)
SEQUENCES, LENGTH, FEW = 128, 2048, 32
RUNS: dict[str, tuple[str, tuple[int, ...], tuple[int | None, ...]]] = {
    "stories260K": ("gamma", (0, 1, 2), (4096, 8192, 16384, None)),
    "demo": ("gamma", (0, 1), (8192, 32768, None)),
    "ref-7m": ("uniform", (0, 1), (8192, 32768, None)),
}
"""Method, seeds, and tokens; None: all that 128 sequences of the length that the model allows have. Scores of `uniform`
know no text, so that KL tells of the candidates alone; what more text does for scores is in allocation.json."""
STORIES = ("stories260K",)
HELD_OUT, HELD_OUT_LENGTH = 48, 256


def folder_of(name: str) -> Path:
    """A model of ours, or of the data that is kept beside the project."""
    return ROOT / "benchmarks" / "demo" / "model" if name == "demo" else DATA / "models" / name


def shape(tokens: int | None, inventory: Inventory) -> tuple[int, int]:
    """Sequences and their length."""
    if tokens is None:
        return SEQUENCES, inventory.sequence_length(LENGTH)
    length = inventory.sequence_length(min(LENGTH, max(256, tokens // FEW)))
    return tokens // length, length


def texts(name: str, folder: Path) -> tuple[Path, Path] | None:
    """A file to calibrate on, of a training split, and one of another split to measure on."""
    source = DATA / "text"
    if not source.is_dir():
        return None
    if name in STORIES:
        return source / "tinystories.train1000.json", source / "tinystories.valid.txt"
    cut = folder / "calibration.txt"
    if not cut.exists():
        books = lzma.decompress((source / "books.train.txt.xz").read_bytes()).decode()
        pieces = [books[i : i + 20_000] for i in range(0, len(books), len(books) // 300)]
        write_atomically(cut, "\n".join(pieces))
    return cut, source / "books.valid.txt"


def cell(name: str, model: Path, method: str, tokens: int | None, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Learn from so many tokens, solve, measure: a row a budget."""
    count, length = shape(tokens, read_inventory(model))
    files = texts(name, folder)
    candidates = CandidateSettings(
        widths=WIDTHS, sequences=count, sequence_length=length, seed=seed, calibration=files and files[:1]
    )
    with tempfile.TemporaryDirectory(dir=folder) as work:
        start = time.process_time()
        learned = learn(model, Path(work), candidates, LearningSettings(method=method, seed=seed))
        seconds = time.process_time() - start
        if files is None:
            held_out = calibration_from_model(model, HELD_OUT, HELD_OUT_LENGTH, 99).token_ids
        else:
            held_out = calibration_from_text(model, [files[1]], HELD_OUT, HELD_OUT_LENGTH, 99).token_ids
        bank = BankReader(learned.bank_folder)
        student = Student(BlockStream(bank.arranged(read_inventory(model))), bank, held_out)
        plans = [(bits, solve_scores(learned.scores, SolveSettings(average_bits=bits)).modules) for bits in BITS]
        return [
            {
                "method": method,
                "average_bits": bits,
                "tokens": count * length,
                "sequences": count,
                "sequence_length": length,
                "seed": seed,
                "kl": float(student.losses(plan).kl.mean()),
                "learning_cpu_seconds": round(seconds, 1),
            }
            for bits, plan in plans
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "bench-out" / "calibration")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, (method, seeds, amounts) in RUNS.items():
        model = folder_of(name)
        for seed in seeds if model.is_dir() else ():
            for tokens in amounts:
                kept = folder / f"{name}-{tokens}-{seed}.json"
                if not kept.exists():
                    kept.write_text(json.dumps(cell(name, model, method, tokens, seed, folder)))
                found = json.loads(kept.read_text())
                rows += [{"model": name, "full": tokens is None} | row for row in found]
                print(f"  {name} {found[0]['tokens']} tokens, seed {seed}:", *(f"{r['kl']:.4f}" for r in found),
                      f"{found[0]['learning_cpu_seconds']} s", flush=True)  # fmt: skip
    write(rows)


def mean_kl(rows: list[dict[str, Any]], model: str, bits: float, tokens: int | None) -> float:
    """Over seeds; `tokens` None: of the full calibration."""
    here = [r for r in rows if (r["model"], r["average_bits"]) == (model, bits)]
    found = [r["kl"] for r in here if (r["full"] if tokens is None else r["tokens"] == tokens)]
    return sum(found) / len(found)


def write(rows: list[dict[str, Any]]) -> None:
    claims = []
    for name in dict.fromkeys(r["model"] for r in rows):
        count, length = CandidateSettings().amount(read_inventory(folder_of(name)))
        measured = sorted({r["tokens"] for r in rows if r["model"] == name})
        nearest = max(t for t in measured if t <= count * length)
        ratio = max(mean_kl(rows, name, b, nearest) / mean_kl(rows, name, b, None) for b in BITS)
        text = (
            f"{name}: KL after learning from {nearest} tokens ({count * length} are the default) over that from all "
            f"{measured[-1]}, the worst budget"
        )
        claims.append(claim(text, ratio, "<= 1.02", ratio <= 1.02, None if ratio <= 1.02 else "see the rows"))
    for c in claims:
        print(c)
    seeds = sorted({r["seed"] for r in rows})
    print(write_result("calibration", "make bench-calibration", seeds, rows, claims).relative_to(ROOT))


if __name__ == "__main__":
    main()
