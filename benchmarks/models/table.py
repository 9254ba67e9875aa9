"""Writes docs/models.md: which architectures gamma knows, and what of each is backed by a test.

python benchmarks/models/table.py [--check]

With --check nothing is written, and an old page is an error.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from allocator.model.architectures import architecture_rules, known_architectures  # noqa: E402
from tests.families import (  # noqa: E402
    FAMILIES,
    MODEL_TYPES,
    NOT_NAMED,
    NOT_SERVED,
    NOT_TRIED,
    SERVED_AS,
    SERVED_WITH,
    WRAPPERS,
)

PAGE = ROOT / "docs" / "models.md"
ELSEWHERE = (
    "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "MixtralForCausalLM",
    "Phi3ForCausalLM", "Gemma3ForCausalLM",
)  # fmt: skip
"""Backed by tests/e2e/test_architectures.py, and learned in many tests."""
ON_CUDA = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
"""Backed by tests/gpu/test_engine.py."""
TABLE = ROOT / "allocator" / "model" / "architectures.json"
SINCE = Path(__file__).with_name("since.json")

HEAD = """# Models

The structure of an architecture is found, not written down: `make architectures` builds its model with transformers
{transformers}, without weights and in several sizes, and reads in the source of vLLM {vllm} how each weight is split,
what it is fused with, and whether it can be quantized. The result is `allocator/model/architectures.json`, which the
verbs that need neither torch nor weights read. What neither library tells is in `architectures_by_hand.json` beside it.
A test finds some of the architectures again and compares.

An architecture that is not here, because it is newer: `gamma inspect MODEL --from-model` finds its structure with the
libraries that are installed on your machine, and keeps it there for the other verbs.

What a **yes** means.

- *inspect*: for models of several sizes the tensors that the table says are those that transformers makes, one by one.
- *learn*: a tiny random model runs block by block to the logits of the whole, is learned, solved at mixed widths and
  exported, and the checkpoint opens again (`tests/blocks/test_families.py`).
- *serve on CPU*: vLLM {vllm} gives the same greedy tokens as transformers with the dequantized weights, at mixed widths
  in fused layers (`tests/e2e/test_families.py`; some only with GAMMA_FAMILIES=all).
- *serve on CUDA*: the same on an NVIDIA GPU (`tests/gpu`).
- *since vLLM*: the oldest release, of those that the plugin serves with, whose registry has the architecture
  (`benchmarks/models/since.py` reads them); the oldest of these is {oldest}.

*found* means that nothing is known to be missing and no test has tried it. `gamma plan` knows Gemma 3 and 4, Mistral 3
and Qwen3.5 with their vision towers, and refuses other multimodal models, of which it knows the language model only.
Of all the language model is learned; the vision tower is copied bit for bit. They are served by the plugin's rules for
their language model, which tests try layer by layer and not in a server: vLLM's CPU build imports torchvision for them,
without images too. Where it has a class for the language model alone that does without, as for Gemma 4, that is served
by name.

What vLLM builds without a quantization config stays at 16 bits, embeddings and lm_heads of some families among it;
`gamma inspect` says so of each module. Embeddings that each block has of its own (Gemma 4 E2B and E4B) are copied at 16
bits too, which is about half of such a model. *but experts* means that the experts are stored in a way that is not cut
into modules, and are copied: only the rest is quantized.

| architecture | inspect | learn | serve on CPU | serve on CUDA | since vLLM |
|---|---|---|---|---|---|
"""


def backed() -> dict[str, str]:
    """Architecture -> what tests/families.py calls it."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    names = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]: kind for kind in FAMILIES if kind not in MODEL_TYPES}
    whole = {MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind]: kind for kind in WRAPPERS}
    return {name if isinstance(name, str) else name[0]: kind for name, kind in names.items()} | whole


def row(name: str, families: dict[str, str], since: str) -> str:
    rules, kind = architecture_rules(name), families.get(name)
    if rules.plan_only is not None and rules.plan_only_when is None:
        return f"| {name} | yes | no: {rules.plan_only} | | | {since} |"
    if all(linear.why_16 is not None for linear in rules.linears):
        return f"| {name} | yes | no: none of its modules can be quantized | | | {since} |"
    state = "yes" if kind is not None or name in ELSEWHERE else "found"
    reasons = NOT_SERVED | NOT_NAMED
    serve = f"no: {reasons[kind]}" if kind in reasons else "found" if kind in NOT_TRIED or kind in WRAPPERS else state
    if kind in SERVED_AS:
        serve = f"its language model, with {_options({'hf_overrides': {'architectures': [SERVED_AS[kind]]}})}"
    others = [other for other, of in MODEL_TYPES.items() if of == kind and other in NOT_SERVED]
    if serve == "yes" and kind in SERVED_WITH and (notes := _options(SERVED_WITH[kind])):
        serve += f", with {notes}"
    if serve == "yes" and others:
        serve += f"; with experts no: {NOT_SERVED[others[0]]}"
    cuda = "yes" if name in ON_CUDA else "not tried"
    copied = any(".experts." in other.name and len(other.shape) == 3 for other in rules.others)
    return f"| {name} | yes | {state}{', but experts' if copied else ''} | {serve} | {cuda} | {since} |"


def _options(options: dict[str, Any]) -> str:
    """Options of vLLM as they stand on its command line."""
    said = {
        key.replace("_", "-"): value if isinstance(value, str) else json.dumps(value) for key, value in options.items()
    }
    return ", ".join(f"`--{key} {value}`" for key, value in said.items())


def page() -> str:
    made = json.loads(TABLE.read_text(encoding="utf-8"))
    releases = json.loads(SINCE.read_text(encoding="utf-8"))
    oldest, families = releases["oldest"], backed()
    since = {name: f"{of} or earlier" if of == oldest else of for name, of in releases["since"].items()}
    rows = "".join(f"{row(name, families, since.get(name, ''))}\n" for name in known_architectures())
    refused = "".join(f"| {name} | {reason.removeprefix(f'{name}: ')} |\n" for name, reason in made["refused"].items())
    tail = "\n## Architectures whose structure was not found\n\n| architecture | what is missing |\n|---|---|\n"
    return HEAD.format(**made, oldest=oldest) + rows + tail + refused


def main() -> None:
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE} is old: run python benchmarks/models/table.py")


if __name__ == "__main__":
    main()
