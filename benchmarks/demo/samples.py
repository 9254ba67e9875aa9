"""What the demo model writes at 16 bits, at the demo's budget, and with every module at 2 bits.

    make demo-samples

Prints text and the KL divergence from the 16-bit model, per token, on text that the 16-bit model wrote (seed 1; the
candidates were calibrated on seed 0).
"""

import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from allocator.blocks import calibration_from_model
from allocator.contract.scores import Scores
from allocator.evaluation import load_dequantized, measure_divergence
from allocator.learning import LearningSettings
from allocator.pipeline import CandidateSettings, export, learn, solve_scores

ROOT = Path(__file__).resolve().parents[2]
MODEL = Path("benchmarks/demo/model")
OUT = Path("demo-out/samples")
PROMPTS = [
    "It was a dark night, and the old man",
    '"I am very glad to see you," said',
    "The little girl ran to the window and",
]
BUDGET = "3500000"


def write(model: torch.nn.Module, prompt: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    inputs = tokenizer(prompt, return_tensors="pt")
    settings = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.95, max_new_tokens=70, pad_token_id=0, repetition_penalty=1.1
    )
    torch.manual_seed(1)
    with torch.inference_mode():
        tokens = model.generate(**inputs, generation_config=settings)  # type: ignore[operator]
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def main() -> None:
    os.chdir(ROOT)
    candidates = CandidateSettings(group_size=64, sequences=24, sequence_length=256)
    result = learn(MODEL, OUT / "work", candidates, LearningSettings(passes=2, steps=8))
    scores = Scores.read(result.scores_path)
    smallest, _largest = scores.feasible_bytes()
    original = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    models = {"16 bits": original}
    for name, budget in (("mixed", BUDGET), ("2 bits", str(smallest))):
        folder = OUT / name.replace(" ", "-")
        manifest = solve_scores(scores, budget, None)
        export(manifest, MODEL, result.bank_folder, folder, overwrite=True)
        models[f"{name}, {manifest.tensor_bytes:,} bytes"] = load_dequantized(folder)
    held_out = calibration_from_model(MODEL, 8, 256, seed=1).token_ids
    for name, model in models.items():
        divergence = measure_divergence(original, model, held_out)
        print(f"\n## {name}: KL {divergence.kl:.4f}, perplexity {divergence.perplexity:.2f}")
        for prompt in PROMPTS:
            print("\n" + write(model, prompt))


if __name__ == "__main__":
    main()
