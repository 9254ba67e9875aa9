"""What `gamma learn --granularity channel-block` is worth: the product's own path, at equal bytes of all tensors."""

import lzma
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allocator.blocks import BlockStream
from allocator.blocks.calibration import calibration_from_model, calibration_from_text
from allocator.contract.scores import Scores
from allocator.evaluate import Student
from allocator.model import read_inventory
from allocator.pipeline import CandidateSettings, SolveSettings, learn, solve_scores
from allocator.quantize import BankReader
from allocator.score import LearningSettings
from allocator.solve import Rules

__all__ = ["BITS", "compare", "paired"]

SEQUENCES, HELD_OUT, LENGTH, SEED, RESAMPLES = 48, 64, 256, 0, 4000
BLOCKS = 8
BITS = (2.5, 3.0, 3.5, 4.0)
"""Average bits of the linear modules of the blocks, scales and zero points included; the vocabulary has 16."""
VOCABULARY = {"*embed_tokens": 16}


def compare(name: str, folder: Path, group_size: int, text: Path | None, work: Path) -> list[dict[str, Any]]:
    """The rows of one model and group size: gptq, one learning a granularity, held-out text, losses by sequence."""
    if text is None:
        calibration, held_out = None, calibration_from_model(folder, HELD_OUT, LENGTH, SEED + 1).token_ids
    else:
        books = lzma.decompress((text / "books.train.txt.xz").read_bytes()).decode()
        parts = work / "calibration.txt"
        parts.write_text("\n".join(books[i : i + 4000] for i in range(0, len(books), len(books) // 300)))
        calibration = [parts]
        held_out = calibration_from_text(folder, [text / "books.valid.txt"], HELD_OUT, LENGTH, SEED).token_ids
    rows: list[dict[str, Any]] = []
    for blocks in (None, BLOCKS):
        candidates = CandidateSettings(
            group_size=group_size, calibration=calibration, sequences=SEQUENCES, sequence_length=LENGTH, seed=SEED,
            channel_blocks=blocks,
        )  # fmt: skip
        start = time.process_time()
        learned = learn(folder, work / f"work-{blocks}", candidates, LearningSettings(seed=SEED))
        seconds = time.process_time() - start
        bank = BankReader(learned.bank_folder)
        student = Student(BlockStream(bank.arranged(read_inventory(folder))), bank, held_out)
        for bits in BITS:
            budget = _budget(learned.scores, bits)
            manifest = solve_scores(learned.scores, SolveSettings(str(budget), rules=Rules(pins=VOCABULARY)))
            losses = student.losses(manifest.modules).kl
            rows.append({
                "model": name, "group_size": group_size, "bits": bits,
                "granularity": "module" if blocks is None else f"channel-block, {blocks}",
                "budget_bytes": budget, "tensor_bytes": manifest.tensor_bytes, "modules": len(manifest.modules),
                "kl": float(losses.mean()), "learning_cpu_seconds": round(seconds, 1),
                "kl_by_sequence": losses.tolist(),
            })  # fmt: skip
            print(
                f"  {name}, group {group_size}, {bits} bits, {rows[-1]['granularity']}: KL {rows[-1]['kl']:.5f}",
                flush=True,
            )
    return rows


def _budget(scores: Scores, bits: float) -> int:
    """Bytes of all tensors; the same for both granularities, so that pieces pay for what each of them has on top."""
    blocks = [m.candidates[0].format.shape for name, m in scores.modules.items() if ".layers." in name]
    outside = sum(max(c.nbytes for c in m.candidates) for name, m in scores.modules.items() if ".layers." not in name)
    return scores.other_bytes + outside + int(sum(rows * columns for rows, columns in blocks) * bits / 8)


def paired(rows: list[dict[str, Any]], whole: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Geometric mean over rows of KL by that of `whole`, and its 95 % interval by a bootstrap over sequences."""
    ours, theirs = (torch.tensor([r["kl_by_sequence"] for r in of], dtype=torch.float64) for of in (rows, whole))
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(ours.shape[1], (RESAMPLES, ours.shape[1]), generator=generator)

    def ratio(a: Tensor, b: Tensor) -> Tensor:
        return (a.mean(-1) / b.mean(-1)).log().mean(0).exp()

    resampled = ratio(ours[:, drawn], theirs[:, drawn])
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(ratio(ours, theirs)), low, high
