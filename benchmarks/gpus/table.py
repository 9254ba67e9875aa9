"""Writes docs/gpus.md: the smallest and the recommended GPU of published models, by the arithmetic of `gamma plan`.

python benchmarks/gpus/table.py [--check]

With --check nothing is written, and an old page is an error.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from allocator.contract.errors import InputError  # noqa: E402
from allocator.plan import Plan, PlanRequest, load_catalogue  # noqa: E402
from allocator.plan.plan import plans_of_catalogue  # noqa: E402
from allocator.plan.weights import read_model  # noqa: E402

PAGE = ROOT / "docs" / "gpus.md"
CONFIGS = ROOT / "tests" / "fixtures" / "configs"
MODELS = {
    "Llama-3.1-8B": "llama-3.1-8b",
    "Qwen3-8B": "qwen3-8b",
    "Qwen3-14B": "qwen3-14b",
    "Phi-4 (14B)": "phi-4",
    "Mistral-Small-3.2-24B": "mistral-small-3.2-24b",
    "Gemma-3-27B (text)": "gemma-3-27b",
    "Qwen3.5-27B": "qwen3.5-27b",
    "Qwen3-30B-A3B": "qwen3-30b-a3b",
    "Nemotron-3-Nano-30B-A3B": "nemotron-3-nano-30b-a3b",
    "OLMo-3-32B": "olmo-3-32b",
    "EXAONE-4-32B": "exaone-4-32b",
    "GLM-4-32B": "glm-4-32b",
    "Qwen2.5-32B": "qwen2.5-32b",
    "Qwen3-32B": "qwen3-32b",
    "Qwen3.5-35B-A3B": "qwen3.5-35b-a3b",
    "Seed-OSS-36B": "seed-oss-36b",
    "Qwen3-Next-80B-A3B": "qwen3-next-80b-a3b",
}
CONTEXTS = (8192, 32768)
SEQUENCES = 4
LEAST_BITS, GOOD_BITS = 2.5, 4.25

HEAD = f"""# Which GPU for which model

One GPU, {SEQUENCES} sequences of the whole context at once, fp8 KV cache, group size 128, vLLM's other defaults.
*Smallest* is the card of least memory that leaves {LEAST_BITS} average bits or more a quantizable weight, *recommended*
the least that leaves {GOOD_BITS} or more; scales and zero points count. The bits are those that fit. Cards without fp8
(before compute capability 8.0) are left out. Written by `python benchmarks/gpus/table.py` from the arithmetic of
`gamma plan`, whose lines say what each number rests on; a test computes every row again. How good a model is at so many
bits is its own affair: `gamma sweep` shows that.

| model | context | smallest GPU | bits | recommended GPU | bits |
|---|---|---|---|---|---|
"""


def first_with(plans: list[Plan], bits: float) -> tuple[str, str]:
    """The first card on which so many average bits fit, and how many do."""
    for plan in plans:
        average = plan.verdict.average_bits
        if plan.verdict.fits and average is not None and average >= bits:
            return plan.device.name.removeprefix("NVIDIA "), f"{average:.2f}"
    return "none", "-"


def rows() -> list[str]:
    """The rows of the table, one a model and context; contexts beyond the model's are left out."""
    found = []
    for name, file in MODELS.items():
        model = read_model(str(CONFIGS / f"{file}.json"))
        for context in CONTEXTS:
            request = PlanRequest(max_model_len=context, max_num_seqs=SEQUENCES, kv_cache_dtype="fp8")
            try:
                plans = plans_of_catalogue(model.shape, load_catalogue(), request, model=name)
            except InputError:
                continue
            cells = (name, f"{context // 1024}k", *first_with(plans, LEAST_BITS), *first_with(plans, GOOD_BITS))
            found.append(f"| {' | '.join(cells)} |")
    return found


def page() -> str:
    """All of docs/gpus.md."""
    return HEAD + "\n".join(rows()) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(None if PAGE.read_text() == page() else f"{PAGE.relative_to(ROOT)} is old: run {Path(__file__).name}")
    PAGE.write_text(page())
    print(PAGE.relative_to(ROOT))
