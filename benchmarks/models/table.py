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
from allocator.model.other_names import RENAMED  # noqa: E402
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


OTHER_NAMES = """
## Under other names

Each `XForCausalLM` of the table is also known as

- `XForSequenceClassification`, a classifier or reranker: `score` stays at 16 bits, and what an error costs is measured
  by the scores, in nats; a single one is that of yes against no.
- `XModel`, an embedding model, or `XForCausalLM` in a folder with the modules.json of sentence-transformers
  (Qwen3-Embedding, whose files have no lm_head). What an error costs is by how much it turns a token's last state: 1 -
  cosine. It predicts nothing, so `tune`, `refine` and `--verify`, which measure KL divergence, refuse it. Models whose
  tokens see those behind them (`is_causal: false`) are refused.

Both calibrate on `--calibration`, or on text from Python's documentation. vLLM on CPU gives the scores and embeddings
of transformers with the dequantized weights (`tests/e2e/test_other_heads.py`, Qwen3), also of a Qwen3-Reranker that
stays a `Qwen3ForCausalLM` ([serving](serving.md#rerankers-and-embedding-models)).

vLLM serves with the class of another name: {renamed}. Where transformers does not know the model's own config
(InternLM3, IQuestCoder, TeleChat3), learning reads it as that of Llama, and vLLM wants `--trust-remote-code` as for the
original; no test serves these.

## Layers that predict further tokens

The MTP layers of Qwen3-Next, Qwen3.5, DeepSeek-V3, GLM-4.5 and others (`mtp.*`, or blocks after the last) are copied as
they are, at 16 bits: `gamma inspect` names them, scores and manifest say their bytes (`predicting_bytes`, a part of
`other_bytes`), so that a budget in bytes of the checkpoint counts them. vLLM loads them only with
`--speculative-config '{{"method": "mtp", "num_speculative_tokens": 1}}'`; a plan does not count them. As many
drafts are accepted as with dequantized weights, at whatever widths the rest is; tried on vLLM's CPU build with
GLM-4.5's (in the tests, where the answers are those without too), Qwen3-Next's and DeepSeek-V3's (by hand; there
vLLM's answers with drafts differ from those without, with dequantized weights as well).
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
    renamed = ", ".join(f"{name} ({other.of})" for name, other in RENAMED.items())
    return HEAD.format(**made, oldest=oldest) + rows + OTHER_NAMES.format(renamed=renamed) + tail + refused


def main() -> None:
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE} is old: run python benchmarks/models/table.py")


if __name__ == "__main__":
    main()
