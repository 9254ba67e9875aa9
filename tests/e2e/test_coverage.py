"""What vLLM offers besides plain generation, on quantized layers: the answers stay those of transformers."""

import random

import pytest

torch = pytest.importorskip("torch")

from tests.e2e.conftest import succeeded  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TOKENS = 8
_RANDOM = random.Random(0)
SHARED = [_RANDOM.randrange(1, 4096) for _ in range(70)]
PROMPTS = [[*SHARED, 7, 8, 9], SHARED, [*SHARED, 11]]
CROWD = [[_RANDOM.randrange(1, 4096) for _ in range(_RANDOM.randint(1, 100))] for _ in range(200)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory, checkpoints, exported, run_engines):
    gamma, dequantized = (str(path) for path in checkpoints("demo"))
    generate = ["generate", {"prompts": PROMPTS, "tokens": TOKENS}]
    jobs = [{"name": "transformers", "model": dequantized, "steps": [generate]}]

    def add(name, steps, kernel="ark", **options):
        jobs.append({"name": name, "model": gamma, "kernel": kernel, "steps": steps, "options": options})

    add("prefix caching", [generate, generate], enable_prefix_caching=True)
    add("chunked prefill", [generate], enable_chunked_prefill=True, max_num_batched_tokens=32)
    draft = {"model": str(exported(2.7)[1]), "num_speculative_tokens": 3, "method": "draft_model"}
    add("quantized draft", [generate], speculative_config=draft)
    crowd = [[verb, {"prompts": CROWD, "tokens": TOKENS}] for verb in ("generate", "singly")]
    add("crowd", crowd, max_num_seqs=200)
    results = run_engines(jobs, tmp_path_factory.mktemp("coverage"))
    return lambda name: succeeded(results[name])


def test_prefix_caching(answers):
    assert answers("prefix caching") == answers("transformers") * 2


def test_chunked_prefill(answers):
    assert answers("chunked prefill") == answers("transformers")


def test_speculative_decoding_with_a_quantized_draft(answers):
    assert answers("quantized draft") == answers("transformers")


def test_two_hundred_concurrent_requests_are_answered_as_one_at_a_time(answers):
    together, singly = answers("crowd")
    assert together == singly
