"""What `gamma tune` brings: KL before, after the blocks and after the scales, on text that nothing was chosen on.

    python benchmarks/quantizers/tuning.py BANK

BANK has candidates of ref-7m at 2 and 3 bits. Measured are 2 bits, and 2.5 bits: gate and up at 2, the rest at 3.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from allocator.blocks import BlockStream  # noqa: E402
from allocator.blocks.calibration import Calibration, calibration_from_text  # noqa: E402
from allocator.blocks.calibration.calibration_run import CalibrationRun  # noqa: E402
from allocator.blocks.hidden_states import HiddenStates  # noqa: E402
from allocator.evaluate import Student  # noqa: E402
from allocator.model import read_inventory  # noqa: E402
from allocator.pipeline import SolveSettings, solve_scores  # noqa: E402
from allocator.pipeline.tuning import SCALE_STEPS, TuneRequest, tune  # noqa: E402
from allocator.quantize import BankReader  # noqa: E402
from allocator.score import LearningSettings, learn_scores  # noqa: E402
from allocator.solve.units import Rules  # noqa: E402
from benchmarks.quantizers.bench import FRESH, HELD_OUT, LENGTH, REFERENCE, SEED  # noqa: E402
from benchmarks.record import write_result  # noqa: E402

PINS = {
    "2 bits": {"model.layers.*": 2, "model.embed_tokens": 16},
    "2.5 bits": {"*.gate_proj": 2, "*.up_proj": 2, "*.self_attn.*": 3, "*.down_proj": 3, "model.embed_tokens": 16},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", type=Path)
    parser.add_argument("--sequences", type=int, default=340)
    parser.add_argument("--quantizer", default="learned-rounding")
    parser.add_argument("--scale-steps", type=int, default=SCALE_STEPS)
    parser.add_argument("--only", choices=list(PINS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, text = REFERENCE
    stream, bank = BlockStream(read_inventory(model)), BankReader(args.bank)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        content, halves = text.read_text(), [Path(work) / name for name in ("first.txt", "second.txt")]
        for path, half in zip(halves, (content[: len(content) // 2], content[len(content) // 2 :]), strict=True):
            path.write_text(half)
        texts = {
            "wikitext2": calibration_from_text(model, [FRESH], HELD_OUT, LENGTH, SEED).token_ids,
            "books": calibration_from_text(model, [halves[1]], HELD_OUT, LENGTH, SEED).token_ids,
        }
        no_text = Calibration(torch.zeros(1, 2, dtype=torch.int64), "none")
        hidden = HiddenStates(Path(work) / "hidden", 1, 2, stream.inventory.shape.hidden_size)
        scores = learn_scores(CalibrationRun(stream, no_text, hidden), bank, LearningSettings(method="uniform"))
        for name in [args.only] if args.only else PINS:
            most = str(scores.feasible_bytes()[1])
            manifest = solve_scores(scores, SolveSettings(budget=most, rules=Rules(PINS[name], {}, {})))
            out = Path(work) / name
            begun = time.process_time()
            found = tune(
                TuneRequest(
                    manifest, model, args.bank, [halves[0]], out, args.sequences, LENGTH, SEED + 1, args.quantizer,
                    args.scale_steps,
                )
            )  # fmt: skip
            seconds = time.process_time() - begun
            assert found.tuning is not None
            row = {"bits": name, "from": bank.bank.quantizer, "sequences": args.sequences, "cpu_seconds": seconds}
            row |= {"selection": found.tuning.model_dump(mode="json")}
            for of, tokens in texts.items():
                kls = [
                    float(Student(stream, reader, tokens).losses(manifest.modules).kl.mean())
                    for reader in (bank, BankReader(out / "bank"))
                ]
                row[of] = kls
            rows.append(row)
            print(row, flush=True)
    print(write_result("tuning", "python benchmarks/quantizers/tuning.py BANK", [SEED, SEED + 1], rows, []))


if __name__ == "__main__":
    main()
