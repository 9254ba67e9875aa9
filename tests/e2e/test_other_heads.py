"""Models with something else behind their last block than an lm_head, at mixed widths, against Hugging Face
transformers with the dequantized weights: scores (rerankers, classifiers), nothing (embedding models), and layers that
predict further tokens beside it (MTP)."""

import json
import shutil

import pytest

torch = pytest.importorskip("torch")

from tests.e2e.conftest import DEMO, mixed_with_vocabulary, succeeded  # noqa: E402
from tests.families import SIZES, make_family  # noqa: E402

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


def _write_predicting(folder):
    """GLM-4.5 as it is published, with a layer that predicts the token after the next. The model repeats the last
    token, which that layer knows, if its weights are what the file says."""
    from safetensors.torch import load_file, save_file

    make_family("glm4_moe", folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor *= 0.02
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone()
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    block, extra = (f"model.layers.{config['num_hidden_layers'] - more}." for more in (1, 0))
    tensors |= {name.replace(block, extra): t.clone() for name, t in tensors.items() if name.startswith(block)}
    size = len(embedding[0])
    tensors[f"{extra}eh_proj.weight"] = torch.cat([torch.eye(size), torch.zeros(size, size)], 1).bfloat16()
    tensors |= {f"{extra}{name}.weight": torch.ones(size).bfloat16() for name in ("enorm", "hnorm", "shared_head.norm")}
    tensors |= {f"{extra}{name}.weight": embedding.clone() for name in ("embed_tokens", "shared_head.head")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


KINDS = ("classifier", "embedding", "reranker")
TOKENS = 16


@pytest.fixture(scope="module")
def answers(tmp_path_factory, serving, run_engines):
    """The answers of vLLM by kind, and those of transformers."""
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
    model, gamma, plain = (folder / "predicting" / name for name in ("model", "gamma", "plain"))
    declared = make_checkpoint(_write_predicting(model), gamma, _groups_of_32)
    assert declared.modules["lm_head"].quantized
    write_dequantized(gamma, plain)
    generate = ["generate", {"prompts": PROMPTS, "tokens": TOKENS}]
    jobs.append({"name": "transformers", "model": str(plain), "steps": [generate]})
    speculative = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
    options = {"skip_tokenizer_init": True, "disable_log_stats": False} | speculative
    job = {"name": "predicting", "model": str(gamma), "kernel": "torch", "options": options}
    jobs.append(job | {"steps": [generate, ["accepted", {}]]})
    results = run_engines(jobs, folder)
    return {kind: succeeded(result) for kind, result in results.items()}, expected


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_embeddings_equal_those_of_transformers(answers, kind):
    served, expected = answers
    torch.testing.assert_close(torch.tensor(served[kind][0]), expected[kind], rtol=1e-4, atol=1e-5)


def test_layers_that_predict_further_tokens_are_served_as_the_file_has_them(answers):
    served, _ = answers
    tokens, accepted = served["predicting"]
    assert tokens == served["transformers"][0]
    assert accepted >= TOKENS * len(PROMPTS) // 2 - len(PROMPTS)  # every drafted token is right
