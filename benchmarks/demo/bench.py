"""What the demo model writes at 16 bits, at the demo's budget, and with every module at 2 bits.

    make bench-demo

Prints text, and the KL divergence from the 16-bit model a token, on text that the 16-bit model wrote with another
seed than the calibration text. Writes benchmarks/results/demo.json.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from allocator.blocks.calibration import calibration_from_model  # noqa: E402
from allocator.contract.safetensors_file import read_folder_headers  # noqa: E402
from allocator.evaluate import load_dequantized, measure_divergence  # noqa: E402
from allocator.export import ExportSettings  # noqa: E402
from allocator.pipeline import CandidateSettings, SolveSettings, export, learn, solve_scores  # noqa: E402
from allocator.score import LearningSettings  # noqa: E402
from benchmarks.demo.run import BUDGET, MODEL  # noqa: E402
from benchmarks.record import claim, write_result  # noqa: E402

OUT = Path("demo-out/bench")
PROMPTS = [
    "It was a dark night, and the old man",
    '"I am very glad to see you," said',
    "The little girl ran to the window and",
]
CALIBRATION_SEED, HELD_OUT_SEED, TEXT_SEED = 0, 1, 1
GPTQ = CandidateSettings(group_size=64, sequences=24, sequence_length=256, seed=CALIBRATION_SEED)
RTN = CandidateSettings(quantizer="rtn", widths=(2,), group_size=128, sequences=4, sequence_length=256)


def write(model: Any, prompt: str) -> str:
    """70 tokens, sampled with a fixed seed."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    inputs = tokenizer(prompt, return_tensors="pt")
    settings = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.95, max_new_tokens=70, pad_token_id=0, repetition_penalty=1.1
    )
    torch.manual_seed(TEXT_SEED)
    with torch.inference_mode():
        tokens = model.generate(**inputs, generation_config=settings)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def quantized(name: str, candidates: CandidateSettings, budget: str | None) -> tuple[Any, int]:
    """The dequantized model at `budget` (None: the smallest there is) and its bytes of tensors."""
    folder = OUT / name
    result = learn(MODEL, folder / "work", candidates, LearningSettings())
    manifest = solve_scores(result.scores, SolveSettings(budget or str(result.scores.feasible_bytes()[0])))
    export(manifest, MODEL, result.bank_folder, folder / "checkpoint", ExportSettings(overwrite=True))
    return load_dequantized(folder / "checkpoint"), manifest.tensor_bytes


def main() -> None:
    os.chdir(ROOT)
    original = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    models = {
        "16 bits": (original, sum(t.nbytes for t in read_folder_headers(MODEL).values())),
        "mixed, gptq, group 64": quantized("mixed", GPTQ, BUDGET),
        "2 bits, gptq, group 64": quantized("gptq-2", GPTQ, None),
        "2 bits, rtn, group 128": quantized("rtn-2", RTN, None),
    }
    held_out = calibration_from_model(MODEL, 16, 256, seed=HELD_OUT_SEED).token_ids
    rows = []
    for name, (model, nbytes) in models.items():
        d = measure_divergence(original, model, held_out)
        texts = [write(model, prompt) for prompt in PROMPTS]
        print(f"\n## {name}, {nbytes:,} bytes: KL {d.kl:.4f}, perplexity {d.perplexity:.2f}\n")
        print("\n\n".join(texts))
        rows.append({"model": name, "nbytes": nbytes, "kl": d.kl, "perplexity": d.perplexity, "text": texts})
    full, mixed, _, plain = rows
    ratio = plain["perplexity"] / full["perplexity"]
    claims = [
        claim("perplexity at 2 bits (rtn) over that at 16 bits: visibly broken", ratio, ">= 2", ratio >= 2),
        claim(
            "perplexity at the demo's budget over that at 16 bits: still readable",
            mixed["perplexity"] / full["perplexity"],
            "<= 1.1",
            mixed["perplexity"] / full["perplexity"] <= 1.1,
        ),
    ]
    seeds = [CALIBRATION_SEED, HELD_OUT_SEED, TEXT_SEED]
    print(f"\nwritten: {write_result('demo', 'make bench-demo', seeds, rows, claims).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
