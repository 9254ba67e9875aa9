"""Rerankers, classifiers and embedding models at mixed widths, against Hugging Face transformers with the dequantized
weights."""

import json
import shutil

import pytest

torch = pytest.importorskip("torch")

from tests.e2e.conftest import DEMO, mixed_with_vocabulary, succeeded  # noqa: E402
from tests.families import SIZES  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PROMPTS = [[3, 9, 27, 81, 100, 7] * 4, [5, 6, 300]]
NO, YES = 41, 87
OPTIONS = {"enforce_eager": True}


def _groups_of_32(module):
    num_bits, _, symmetric = mixed_with_vocabulary(module)
    return num_bits, 32, symmetric


def _write(kind, folder):
    """A random model: a classifier of three kinds, an embedding model as sentence-transformers publishes one (its files
    have no lm_head, whatever its config says), or one whose next token says yes or no."""
    import transformers

    classes = {"classifier": "Qwen3ForSequenceClassification", "embedding": "Qwen3Model"}
    changes = {"head_dim": 32, "tie_word_embeddings": kind != "embedding", "num_labels": 3}
    config = transformers.Qwen3Config(**(SIZES | {"vocab_size": 4096} | changes))
    torch.manual_seed(1)
    model = getattr(transformers, classes.get(kind, "Qwen3ForCausalLM"))(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in DEMO.glob("tokenizer*"):
        shutil.copy(path, folder)
    if kind == "embedding":
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["Qwen3ForCausalLM"]}))
        parts = [
            {
                "idx": i,
                "name": str(i),
                "path": f"{i}_{kind}" if i else "",
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, kind in enumerate(("Transformer", "Pooling", "Normalize"))
        ]
        (folder / "modules.json").write_text(json.dumps(parts))
        (folder / "1_Pooling").mkdir()
        pooling = {"word_embedding_dimension": 128, "pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def _expected(kind, folder):
    import transformers

    classes = {"classifier": "AutoModelForSequenceClassification", "embedding": "AutoModel"}
    kinds = getattr(transformers, classes.get(kind, "AutoModelForCausalLM"))
    model = kinds.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            output = model(torch.tensor([prompt]))
            if kind == "classifier":
                answers.append(output.logits[0])
            elif kind == "embedding":
                answers.append(torch.nn.functional.normalize(output.last_hidden_state[0, -1], dim=0))
            else:
                answers.append(output.logits[0, -1, [YES]] - output.logits[0, -1, [NO]])
    return torch.stack(answers)


def _overrides():
    """As vLLM serves Qwen3-Reranker: the rows of two tokens of the lm_head are the score."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(DEMO).convert_ids_to_tokens([NO, YES])
    named = {"architectures": ["Qwen3ForSequenceClassification"], "is_original_qwen3_reranker": True}
    return {"hf_overrides": named | {"classifier_from_token": tokens}}


KINDS = ("classifier", "embedding", "reranker")


@pytest.fixture(scope="module")
def answers(tmp_path_factory, serving, run_engines):
    """Kind -> answers of vLLM and of transformers, `[prompts, numbers]`."""
    from tests.e2e.make_checkpoint import make_checkpoint, write_dequantized

    folder, jobs, expected = tmp_path_factory.mktemp("pooling"), [], {}
    for kind in KINDS:
        model, gamma, plain = (folder / kind / name for name in ("model", "gamma", "plain"))
        declared = make_checkpoint(_write(kind, model), gamma, _groups_of_32)
        assert declared.modules["model.embed_tokens"].quantized
        assert "lm_head" not in declared.modules
        write_dequantized(gamma, plain)
        expected[kind] = _expected(kind, plain)
        verb = "embed" if kind == "embedding" else "classify"
        options = OPTIONS | (_overrides() if kind == "reranker" else {})
        job = {"name": kind, "model": str(gamma), "kernel": "torch", "options": options}
        jobs.append(job | {"steps": [[verb, {"prompts": PROMPTS}]]})
    results = run_engines(jobs, folder)
    return lambda kind: (torch.tensor(succeeded(results[kind])[0]), expected[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_embeddings_equal_those_of_transformers(answers, kind):
    served, expected = answers(kind)
    torch.testing.assert_close(served, expected, rtol=1e-4, atol=1e-5)
