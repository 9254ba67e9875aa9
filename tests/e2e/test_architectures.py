"""Every kind of layer, at mixed widths, against Hugging Face transformers with the dequantized weights."""

import os

import pytest

torch = pytest.importorskip("torch")

from tests.e2e.conftest import mixed_with_vocabulary, succeeded  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KINDS = {
    "llama": "quantized embedding and lm_head, and an embedding whose name vLLM does not tell",
    "qwen3": "one quantized module for embedding and lm_head",
    "qwen2": "biases",
    "phi3": "q/k/v and gate/up in one tensor on disk",
    "gemma3": "scaled embedding, one module for embedding and lm_head, norms of its own",
}
PROMPTS = [[3, 9, 27, 81, 100, 7], [5, 6]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory, serving, run_engines):
    """Tokens by "kind engine"; all engines in one process."""
    from tests.e2e.architectures import make_model
    from tests.e2e.make_checkpoint import make_checkpoint, write_dequantized

    folder = tmp_path_factory.mktemp("architectures")
    jobs = []
    for kind in KINDS:
        gamma, dequantized = folder / kind / "gamma", folder / kind / "dequantized"
        make_checkpoint(make_model(kind, folder / kind / "plain"), gamma, mixed_with_vocabulary)
        write_dequantized(gamma, dequantized)
        steps = [["generate", {"prompts": PROMPTS, "tokens": 16}]]
        jobs.append({"name": f"{kind} transformers", "model": str(dequantized), "steps": steps})

        def add(name, kind=kind, gamma=gamma, steps=steps, environment=(), **options):
            options = {"skip_tokenizer_init": True} | options
            engine = {"kernel": name.split()[0], "options": options, "environment": dict(environment)}
            jobs.append({"name": f"{kind} {name}", "model": str(gamma), "steps": steps} | engine)

        add("torch")
        add("ark")
        if kind in ("llama", "qwen3") and (os.cpu_count() or 1) > 1:
            two = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
            add("ark two ranks", environment=two, tensor_parallel_size=2, distributed_executor_backend="mp")
    results = run_engines(jobs, folder)
    return lambda name: succeeded(results[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", ["torch", "ark"])
def test_greedy_tokens_equal_those_of_transformers(answers, kind, kernel):
    assert answers(f"{kind} {kernel}") == answers(f"{kind} transformers")


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two CPU cores")
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_padded_vocabulary_is_cut_between_two_ranks(answers, kind):
    assert answers(f"{kind} ark two ranks") == answers(f"{kind} transformers")
