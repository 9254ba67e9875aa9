"""Stock vLLM, our plugin switched off, serves what `gamma export --format compressed-tensors` wrote."""

import pytest

torch = pytest.importorskip("torch")

from tests.e2e.conftest import DEMO, succeeded  # noqa: E402
from tests.e2e.test_answers import TEXT  # noqa: E402
from tests.skips import lacking  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def stock_kernel(serving):
    """Skips where stock vLLM cannot multiply 4-bit weights: its build for AVX2 has no such operator."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip(lacking("instruction", "vLLM's build for this CPU has no cpu_gemm_wna16"))


@pytest.fixture(scope="module")
def declared(stock_kernel, tmp_path_factory):
    """ "symmetric" and "asymmetric": the demo model at 4 and 16 bits, equal inside fused layers.

    Stock vLLM multiplies nothing else on a CPU; tests/export and tests/gamma_vllm check the other widths.
    """
    from allocator.export import ExportSettings
    from allocator.pipeline import CandidateSettings, export, learn
    from allocator.score import LearningSettings
    from allocator.solve import Rules, SolveSettings, solve_scores

    folder = tmp_path_factory.mktemp("declared")
    for symmetric, name in ((True, "symmetric"), (False, "asymmetric")):
        candidates = CandidateSettings(
            quantizer="rtn", widths=(4, 16), group_size=64, symmetric=symmetric, sequences=4, sequence_length=64
        )
        result = learn(DEMO, folder / f"{name}-work", candidates, LearningSettings())
        modules = result.scores.modules.items()
        pins = {name: 16 for name, m in modules if name.endswith("embed_tokens") and len(m.candidates) > 1}
        manifest = solve_scores(result.scores, SolveSettings(average_bits=8, fusion="tied", rules=Rules(pins)))
        assert {m.num_bits for m in manifest.modules.values()} == {4, 16}
        export(manifest, DEMO, result.bank_folder, folder / name, ExportSettings("compressed-tensors"))
    return folder


def test_stock_vllm_serves_it(declared, run_engines, tmp_path):
    from transformers import AutoTokenizer

    from allocator.evaluate import load_dequantized

    tokens = AutoTokenizer.from_pretrained(DEMO)(TEXT)["input_ids"][:96]
    jobs = []
    for name in ("symmetric", "asymmetric"):
        score = ["score", {"prompt": tokens, "save": str(tmp_path / f"{name}.pt")}]
        options = {"dtype": "bfloat16"}  # the CPU kernel of stock vLLM takes no float32
        jobs.append(
            {"name": name, "model": str(declared / name), "kernel": "none", "options": options, "steps": [score]}
        )
    results = run_engines(jobs, tmp_path, stock=True)
    assert "gamma" not in (tmp_path / "engine.log").read_text().replace(str(tmp_path), "")
    for name in ("symmetric", "asymmetric"):
        (perplexity,) = succeeded(results[name])
        model = load_dequantized(declared / name)
        with torch.inference_mode():
            logprobs = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        expected = float(torch.exp(-logprobs[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].mean()))
        assert perplexity == pytest.approx(expected, rel=2e-2)
        given = torch.load(tmp_path / f"{name}.pt")
        assert float((given.exp() * (given - logprobs)).sum(-1).mean()) < 2e-2  # nats a token
