# ruff: noqa: E402 - torch and vllm are optional: imported only when they are there
"""Engines on a GPU, captured graphs and all, against Hugging Face transformers with the dequantized weights.

Products in bfloat16 differ a little from those of transformers in float32: texts are scored, tokens not compared.
"""

import pytest

torch = pytest.importorskip("torch")

from tests.e2e.conftest import DEMO, mixed, mixed_with_vocabulary, succeeded
from tests.e2e.test_answers import TEXT, logit_error

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def engines(serving, tmp_path_factory, run_engines):
    """Name -> the answers of its steps, and the files of its log-probabilities; all engines in one process."""
    from transformers import AutoTokenizer

    from tests.e2e.architectures import make_model
    from tests.e2e.make_checkpoint import make_checkpoint, write_dequantized

    folder = tmp_path_factory.mktemp("engines")
    tokens = {"demo": AutoTokenizer.from_pretrained(DEMO)(TEXT)["input_ids"][:96], "experts": list(range(3, 90))}
    make_checkpoint(DEMO, folder / "demo", mixed_with_vocabulary)
    make_checkpoint(make_model("qwen3_moe", folder / "plain"), folder / "experts", _small_groups)
    jobs = []

    def add(name, *between, **options):
        model, _, kernel = name.partition(" ")
        saved = [str(folder / f"{name} {i}.pt") for i in range(len(between) + 1)]
        steps = [["score", {"prompt": tokens[model], "save": saved[0]}]]
        for step, file in zip(between, saved[1:], strict=True):
            steps += [step, ["score", {"prompt": tokens[model], "save": file}]]
        job = {"name": name, "model": str(folder / model), "steps": steps}
        if kernel == "transformers":
            job["model"] += "-dequantized"
        else:
            common = {"dtype": "bfloat16", "gpu_memory_utilization": 0.3, "skip_tokenizer_init": True}
            job |= {"kernel": kernel.split()[0], "options": common | options}
        jobs.append(job)

    for model in ("demo", "experts"):
        write_dequantized(folder / model, folder / f"{model}-dequantized")
        add(f"{model} transformers")
        add(f"{model} humming graphs", enforce_eager=False)
    add("demo humming eager", ["sleep", {"level": 1}], ["sleep", {"level": 2}], enable_sleep_mode=True)
    add("demo torch eager")
    add("experts humming eager")
    results = run_engines(jobs, folder)

    def get(name, step=0):
        return succeeded(results[name])[2 * step], torch.load(folder / f"{name} {step}.pt")

    return get


def _small_groups(module):
    num_bits, _, symmetric = mixed(module)
    return num_bits, 32, symmetric


@pytest.mark.parametrize(
    "name",
    [
        "demo humming eager",
        "demo humming graphs",
        "demo torch eager",
        "experts humming eager",
        "experts humming graphs",
    ],
)
def test_scores_are_those_of_transformers(engines, name):
    perplexity, logits = engines(name)
    expected, exact = engines(f"{name.split()[0]} transformers")
    assert perplexity == pytest.approx(expected, rel=2e-2)
    assert logit_error(logits, exact) < 5e-2


@pytest.mark.parametrize("step", [1, 2], ids=["level 1", "level 2 and reload_weights"])
def test_an_engine_that_slept_answers_as_before(engines, step):
    assert engines("demo humming eager", step)[0] == pytest.approx(engines("demo humming eager")[0], rel=1e-6)
