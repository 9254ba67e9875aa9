"""Every kind of layer, at mixed widths, against Hugging Face transformers with the dequantized weights."""

import os
import shutil

import pytest

torch = pytest.importorskip("torch")

from tests.e2e.conftest import mixed, mixed_with_vocabulary, succeeded  # noqa: E402
from tests.e2e.ranks import HAS_TWO_CORES, TWO_RANKS, needs_two_cores  # noqa: E402
from tests.skips import lacking  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KINDS = {
    "llama": "quantized embedding and lm_head, and an embedding whose name vLLM does not tell",
    "qwen3": "one quantized module for embedding and lm_head",
    "qwen2": "biases",
    "phi3": "q/k/v and gate/up in one tensor on disk",
    "gemma3": "scaled embedding, one module for embedding and lm_head, norms of its own",
    "qwen3_moe": "experts, each with widths of its own",
    "mixtral": "experts under other names, an embedding that vLLM does not quantize",
}
ARK_KINDS = ("llama", "qwen3", "qwen3_moe")
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
PROMPTS = [[3, 9, 27, 81, 100, 7], [5, 6]]


def _choice(kind):
    """Groups of 32, so that two ranks can share every module."""

    def choose(module):
        num_bits, _, symmetric = (mixed if kind == "mixtral" else mixed_with_vocabulary)(module)
        return num_bits, 32, symmetric

    return choose


def _learned_jobs(folder):
    """An untied model through learn, solve and export, with nothing at 16 bits."""
    from allocator.evaluate import load_dequantized
    from allocator.pipeline import CandidateSettings, export, learn
    from allocator.score import LearningSettings
    from allocator.solve import Rules, SolveSettings, solve_scores
    from tests.e2e.architectures import make_model

    model, gamma, plain = make_model("llama", folder / "learned" / "plain"), folder / "learned" / "gamma", folder / "to"
    candidates = CandidateSettings(group_size=32, sequences=4, sequence_length=32)
    result = learn(model, folder / "learned" / "work", candidates, LearningSettings(batch_tokens=64))
    manifest = solve_scores(result.scores, SolveSettings(average_bits=4.5, rules=Rules(ceilings={"*": 8})))
    assert {manifest.modules[n].num_bits for n in ("model.embed_tokens", "lm_head")} <= {2, 3, 4, 5, 6, 8}
    export(manifest, model, result.bank_folder, gamma)
    load_dequantized(gamma).save_pretrained(plain)
    steps = [["generate", {"prompts": PROMPTS, "tokens": 16}]]
    options = {"skip_tokenizer_init": True}
    return [
        {"name": "learned transformers", "model": str(plain), "steps": steps},
        {"name": "learned torch", "model": str(gamma), "steps": steps, "kernel": "torch", "options": options},
    ]


@pytest.fixture(scope="module")
def answers(tmp_path_factory, serving, run_engines):
    """Tokens by "kind engine"; all engines in one process."""
    from tests.e2e.architectures import make_model
    from tests.e2e.make_checkpoint import make_checkpoint, write_dequantized

    folder = tmp_path_factory.mktemp("architectures")
    jobs = []
    for kind in KINDS:
        gamma, dequantized = folder / kind / "gamma", folder / kind / "dequantized"
        make_checkpoint(make_model(kind, folder / kind / "plain"), gamma, _choice(kind))
        write_dequantized(gamma, dequantized)
        steps = [["generate", {"prompts": PROMPTS, "tokens": 16}]]
        jobs.append({"name": f"{kind} transformers", "model": str(dequantized), "steps": steps})

        def add(name, kind=kind, gamma=gamma, steps=steps, environment=(), **options):
            options = {"skip_tokenizer_init": True} | options
            engine = {"kernel": name.split()[0], "options": options, "environment": dict(environment)}
            jobs.append({"name": f"{kind} {name}", "model": str(gamma), "steps": steps} | engine)

        add("torch", steps=[*steps, ["zero", {}], ["reload", {}], *steps])
        if kind in ARK_KINDS:
            add("ark")
        if kind in ("llama", "qwen3_moe") and COMPILER:
            add("ark compiled", enforce_eager=False)
        if not HAS_TWO_CORES:
            continue
        two = {"environment": TWO_RANKS, "distributed_executor_backend": "mp"}
        if kind in ("llama", "qwen3_moe"):
            add("ark two ranks", tensor_parallel_size=2, **two)
        if kind == "qwen3_moe":
            add("ark experts on two ranks", tensor_parallel_size=2, enable_expert_parallel=True, **two)
    jobs += _learned_jobs(folder)
    results = run_engines(jobs, folder)
    return lambda name: succeeded(results[name])


@pytest.mark.parametrize(("kind", "kernel"), [*((k, "torch") for k in KINDS), *((k, "ark") for k in ARK_KINDS)])
def test_greedy_tokens_equal_those_of_transformers(answers, kind, kernel):
    assert answers(f"{kind} {kernel}")[:1] == answers(f"{kind} transformers")


def test_an_embedding_and_an_lm_head_that_were_learned_are_served(answers):
    assert answers("learned torch") == answers("learned transformers")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_can_be_reloaded(answers, kind):
    assert answers(f"{kind} torch")[-1:] == answers(f"{kind} transformers")


@pytest.mark.skipif(COMPILER is None, reason=lacking("program", "g++, for torch.compile, is not here"))
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_compiled_engine_answers_alike(answers, kind):
    assert answers(f"{kind} ark compiled") == answers(f"{kind} transformers")


@needs_two_cores
@pytest.mark.parametrize(
    "name", ["llama ark two ranks", "qwen3_moe ark two ranks", "qwen3_moe ark experts on two ranks"]
)
def test_two_ranks_answer_alike(answers, name):
    # the vocabulary of 200 is padded to 256 and cut; experts are cut, or dealt out
    assert answers(name) == answers(f"{name.split()[0]} transformers")
