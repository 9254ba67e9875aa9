"""What it is worth that embedding and lm_head are modules of the program: KL at equal bytes of all tensors.

    make bench-vocabulary

Scores are learned once a model; each budget is solved with the vocabulary free, and with it pinned to 16 and to 8 bits,
as most tools leave it. The small models at hand tie embedding and lm_head. Writes benchmarks/results/vocabulary.json.
"""

import argparse
import json
import lzma
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from allocator.blocks import BlockStream  # noqa: E402
from allocator.blocks.calibration import calibration_from_model, calibration_from_text  # noqa: E402
from allocator.contract.errors import InfeasibleBudgetError  # noqa: E402
from allocator.evaluate import Student  # noqa: E402
from allocator.model import read_inventory  # noqa: E402
from allocator.pipeline import CandidateSettings, SolveSettings, learn, solve_scores  # noqa: E402
from allocator.quantize import BankReader  # noqa: E402
from allocator.score import LearningSettings  # noqa: E402
from allocator.solve import Rules  # noqa: E402
from benchmarks.record import claim, write_result  # noqa: E402

SEQUENCES, HELD_OUT, LENGTH, SEED = 48, 64, 256, 0
BITS = (2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
"""Average bits of all weights of the model that can be quantized, scales and zero points included."""
WAYS: dict[str, dict[str, int]] = {
    "in the program": {},
    "at 8 bits": {"*embed_tokens": 8, "lm_head": 8},
    "at 16 bits": {"*embed_tokens": 16, "lm_head": 16},
}


def run(name: str, folder: Path, shared: Path, work: Path) -> list[dict[str, Any]]:
    """The rows of one model."""
    if (shared / "text").is_dir():
        books = lzma.decompress((shared / "text" / "books.train.txt.xz").read_bytes()).decode()
        text = work / "calibration.txt"
        text.write_text("\n".join(books[i : i + 4000] for i in range(0, len(books), len(books) // 300)))
        calibration: list[Path] | None = [text]
        held_out = calibration_from_text(folder, [shared / "text" / "books.valid.txt"], HELD_OUT, LENGTH, SEED)
    else:
        calibration, held_out = None, calibration_from_model(folder, HELD_OUT, LENGTH, SEED + 1)
    candidates = CandidateSettings(calibration=calibration, sequences=SEQUENCES, sequence_length=LENGTH, seed=SEED)
    result = learn(folder, work / "work", candidates, LearningSettings(seed=SEED))
    inventory = read_inventory(folder)
    student = Student(BlockStream(inventory), BankReader(result.bank_folder), held_out.token_ids)
    outside = [m.name for m in inventory.modules if m.block is None]
    rows = []
    for bits in BITS:
        for way, pins in WAYS.items():
            known = {p: b for p, b in pins.items() if p != "lm_head" or "lm_head" in outside}
            # The budget is that of `--average-bits` over all modules, whatever is pinned.
            budget = str(solve_scores(result.scores, SolveSettings(average_bits=bits)).budget.nbytes)
            row: dict[str, Any] = {"model": name, "average_bits": bits, "budget_bytes": int(budget), "vocabulary": way}
            try:
                manifest = solve_scores(result.scores, SolveSettings(budget, rules=Rules(pins=known)))
            except InfeasibleBudgetError:
                rows.append(row | {"kl": None, "why": "the budget is below the smallest checkpoint"})
                continue
            kl = float(student.losses(manifest.modules).kl.mean())
            widths = {n: manifest.modules[n].num_bits for n in outside}
            rows.append(row | {"tensor_bytes": manifest.tensor_bytes, "widths": widths, "kl": kl})
            print(f"{name} {bits} bits, vocabulary {way} {widths}: KL {kl:.5f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "bench-out" / "vocabulary", help="rows that are done")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data", help="models/ and text/")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    models = {"demo": ROOT / "benchmarks" / "demo" / "model"}
    if (args.shared / "models" / "ref-7m").is_dir():
        models = {"ref-7m": args.shared / "models" / "ref-7m"} | models
    rows: list[dict[str, Any]] = []
    for name, folder in models.items():
        saved = args.folder / f"{name}.json"
        if not saved.exists():
            with tempfile.TemporaryDirectory() as work:
                saved.write_text(json.dumps(run(name, folder, args.shared, Path(work))))
        rows += json.loads(saved.read_text())
    kl = {(r["model"], r["average_bits"], r["vocabulary"]): r["kl"] for r in rows}
    claims = []
    for way in ("at 16 bits", "at 8 bits"):
        ratios = [kl[m, b, "in the program"] / kl[m, b, way] for m in models for b in BITS if kl[m, b, way] is not None]
        text = (
            f"largest ratio of KL with the vocabulary in the program to that with it {way}, same bytes of all tensors"
        )
        claims.append(claim(text, max(ratios), "<= 1.02", max(ratios) <= 1.02))
    for c in claims:
        print(c)
    print(write_result("vocabulary", "make bench-vocabulary", [SEED], rows, claims).relative_to(ROOT))


if __name__ == "__main__":
    main()
