"""Families whose structure was found, at mixed widths, against Hugging Face transformers with the dequantized weights.

One process serves them one after the other. Those that are like another are left out unless GAMMA_FAMILIES=all.
"""

import os

import pytest

torch = pytest.importorskip("torch")

from tests.e2e.conftest import mixed_with_vocabulary, succeeded  # noqa: E402
from tests.families import (  # noqa: E402
    FAMILIES,
    NOT_NAMED,
    NOT_SERVED,
    NOT_TRIED,
    SERVED_AS,
    SERVED_WITH,
    chosen,
    make_family,
    make_wrapper,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

OPTIONS = {"skip_tokenizer_init": True}
PROMPTS = [[3, 9, 27, 81, 100, 7] * 6, [5, 6]]  # the first is longer than the windows
SERVED = chosen(name for name in FAMILIES if name not in (*NOT_SERVED, *NOT_NAMED, *NOT_TRIED))


def _groups_of_32(module: str) -> tuple[int, int, bool]:
    num_bits, _, symmetric = mixed_with_vocabulary(module)
    return num_bits, 32, symmetric


UNSERVED = chosen(NOT_SERVED) if "GAMMA_FAMILIES" in os.environ else ["nemotron_h_moe"]
WHOLE = chosen(SERVED_AS)


@pytest.fixture(scope="module")
def answers(tmp_path_factory, serving, run_engines):
    from tests.e2e.make_checkpoint import make_checkpoint, write_dequantized

    folder, jobs = tmp_path_factory.mktemp("families"), []
    steps = [["generate", {"prompts": PROMPTS, "tokens": 16}]]
    for name in SERVED:
        model, gamma, plain = (folder / name / kind for kind in ("model", "gamma", "plain"))
        make_checkpoint(make_family(name, model), gamma, _groups_of_32)
        write_dequantized(gamma, plain)
        jobs.append({"name": f"{name} transformers", "model": str(plain), "steps": steps})
        engine = {"kernel": "torch", "options": OPTIONS | SERVED_WITH.get(name, {})}
        jobs.append({"name": f"{name} vllm", "model": str(gamma), "steps": steps} | engine)
    for name in WHOLE:
        model, gamma, plain = (folder / name / kind for kind in ("model", "gamma", "plain"))
        make_checkpoint(make_wrapper(name, model), gamma, _groups_of_32)
        write_dequantized(gamma, plain)
        engine = {"kernel": "torch", "options": OPTIONS | {"hf_overrides": {"architectures": [SERVED_AS[name]]}}}
        jobs.append({"name": f"{name} transformers", "model": str(plain), "steps": steps})
        jobs.append({"name": f"{name} vllm", "model": str(gamma), "steps": steps} | engine)
    for name in UNSERVED:
        model = str(make_family(name, folder / name))
        jobs.append({"name": f"{name} transformers", "model": model, "steps": steps})
        jobs.append({"name": f"{name} vllm", "model": model, "steps": steps, "kernel": "torch", "options": OPTIONS})
    return run_engines(jobs, folder)


@pytest.mark.parametrize("name", SERVED)
def test_greedy_tokens_equal_those_of_transformers(answers, name):
    assert succeeded(answers[f"{name} vllm"]) == succeeded(answers[f"{name} transformers"])


@pytest.mark.parametrize("name", WHOLE)
def test_the_language_model_of_a_multimodal_one_is_served_alone(answers, name):
    """With vLLM's `--hf-overrides`: its CPU build does not bring what towers need."""
    assert succeeded(answers[f"{name} vllm"]) == succeeded(answers[f"{name} transformers"])


@pytest.mark.parametrize("name", UNSERVED)
def test_what_is_not_served_is_not_served_without_quantization_either(answers, name):
    answer = answers[f"{name} vllm"]
    assert "error" in answer or answer["steps"] != succeeded(answers[f"{name} transformers"])
