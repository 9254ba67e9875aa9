"""Bytes after loading are predicted to the byte: random assignments in live workers of vLLM, one rank and two."""

import json
import random

import pytest

torch = pytest.importorskip("torch")

from allocator.contract.layout import WIDTHS  # noqa: E402
from allocator.contract.manifest import Manifest  # noqa: E402
from allocator.model import read_shape  # noqa: E402
from allocator.plan import PlanRequest  # noqa: E402
from allocator.plan.weights import residency_of  # noqa: E402
from gamma_vllm.kernels.ark import planned_as  # noqa: E402
from gamma_vllm.kernels.native import NativeKernel  # noqa: E402
from tests.e2e.conftest import succeeded  # noqa: E402
from tests.e2e.ranks import HAS_TWO_CORES, TWO_RANKS, needs_two_cores  # noqa: E402
from tests.families import make_family  # noqa: E402
from tests.skips import lacking_kernel  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

OTHER_LAYERS = [
    # latent attention, shared experts, a dense block; with AMX vLLM keeps the projections of keys in a form of its own
    *([] if planned_as() == "ark-amx" else ["deepseek_v2"]),
    "gemma4_text",  # heads by the kind of the block, keys that are the values too
    "gpt_oss",  # experts that are stacked and have biases
    "lfm2",  # short convolutions
    "nemotron_h",  # Mamba 2, blocks of one kind each
    "qwen2_moe",  # a shared expert with a gate
    "qwen3_next",  # linear attention
]
CASES = [
    *((kind, kernel, 1, False) for kind in ("llama", "qwen3", "qwen3_moe") for kernel in ("torch", "ark")),
    ("phi3", "ark", 1, False),
    ("mixtral", "ark", 1, False),
    ("cut", "ark", 1, False),
    ("llama", "torch", 2, False),
    ("qwen3", "ark", 2, False),
    ("qwen3_moe", "ark", 2, False),
    ("qwen3_moe", "torch", 2, True),
    *((kind, "torch", 1, False) for kind in OTHER_LAYERS),
]
"""Kind of model (llama has a head of its own, qwen3 a tied one, phi3 is fused on disk, two have experts,
"cut" is a qwen3 with channel blocks), kernel, ranks, and whether experts are dealt out."""
NATIVE = ("qwen3", "native", 1, False)
WHY_NOT = NativeKernel.why_not(torch.device("cpu"))
MARKED = [
    *(pytest.param(case, marks=[needs_two_cores] if case[2] > 1 else []) for case in CASES),
    pytest.param(NATIVE, marks=pytest.mark.skipif(WHY_NOT is not None, reason=lacking_kernel(WHY_NOT))),
]
RUNNING = [case for case in CASES if case[2] == 1 or HAS_TWO_CORES] + ([NATIVE] if WHY_NOT is None else [])


def random_choice(seed, kind):
    """Widths, and symmetry, at random; groups of 32, so that two ranks can share every module."""
    draw = random.Random(f"{seed} {kind}")

    def choose(module):
        if kind == "mixtral" and module.endswith("embed_tokens"):
            return 16, 32, True  # vLLM builds it without asking the plugin
        return draw.choice(WIDTHS), 32, draw.random() < 0.5

    return choose


def write_cut(model, target):
    """A checkpoint with channel blocks; in some pieces gate and up are of one kind and are packed together."""
    from allocator.pipeline import CandidateSettings, SolveSettings, export, learn, solve_scores
    from allocator.score import LearningSettings

    candidates = CandidateSettings(
        quantizer="rtn", group_size=32, sequences=2, sequence_length=16, widths=(2, 3, 5, 16), channel_blocks=4
    )
    work = target.with_name("work-of-cut")
    learned = learn(model, work, candidates, LearningSettings(draws=2))
    export(solve_scores(learned.scores, SolveSettings(average_bits=4.0)), model, learned.bank_folder, target)


@pytest.fixture(scope="module")
def measured(tmp_path_factory, serving, run_engines):
    """Case -> (bytes predicted for each stage, bytes counted on each rank); all engines in one process."""
    from tests.e2e.architectures import make_model
    from tests.e2e.make_checkpoint import make_checkpoint

    folder = tmp_path_factory.mktemp("resident")
    jobs, predicted = [], {}
    for number, case in enumerate(RUNNING):
        kind, kernel, ranks, dealt = case
        plain, gamma = folder / kind, folder / f"{number}"
        if not plain.exists():
            make = make_family if kind in OTHER_LAYERS else make_model
            make("qwen3" if kind == "cut" else kind, plain)
        if kind == "cut":
            write_cut(plain, gamma)
        else:
            make_checkpoint(plain, gamma, random_choice(number, kind))
        shape = read_shape(json.loads((plain / "config.json").read_text()))
        planned = planned_as() if kernel == "ark" else kernel
        request = PlanRequest(tensor_parallel_size=ranks, expert_parallel=dealt, kernel=planned)
        predicted[case] = residency_of(shape, request).stage_bytes(Manifest.read(gamma / "gamma_manifest.json").modules)
        options = {"skip_tokenizer_init": True, "dtype": "bfloat16"}
        if ranks > 1:
            options |= {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp"}
            options |= {"enable_expert_parallel": dealt}
        environment = TWO_RANKS if ranks > 1 else {}
        job = {"name": str(number), "model": str(gamma), "kernel": kernel, "options": options}
        jobs.append(job | {"environment": environment, "steps": [["resident", {}]]})
    results = run_engines(jobs, folder)
    counted = {case: succeeded(results[str(number)])[0] for number, case in enumerate(RUNNING)}
    return lambda case: (predicted[case], counted[case])


@pytest.mark.parametrize("case", MARKED, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}{'-experts' if c[3] else ''}")
def test_bytes_of_a_rank_are_predicted_to_the_byte(measured, case):
    (predicted,), counted = measured(case)
    assert len(counted) == case[2]
    assert max(counted) == predicted
    if not case[3]:
        assert set(counted) == {predicted}  # every rank holds the same
