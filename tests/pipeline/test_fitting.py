"""One request in, one result out: what `gamma fit` and other programs get."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from allocator.contract.manifest import Manifest
from allocator.pipeline import CandidateSettings, FitRequest, GpuTarget, SolveSettings, fit
from allocator.plan import Plan, PlanRequest, memory_device
from allocator.score import LearningSettings
from tests.watching import Watching


def test_the_kv_cache_is_chosen_in_one_walk(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    begun: list[str] = []

    def see(step: str, done: float) -> None:
        if not begun or begun[-1] != step:
            begun.append(step)

    request = FitRequest(
        model=str(tiny_model("llama")),
        out=tmp_path / "out",
        work=tmp_path / "work",
        target=GpuTarget(memory_device(4 << 30), PlanRequest(max_model_len=64, kernel="torch"), choose_kv_cache=True),
        solving=SolveSettings(),
        candidates=CandidateSettings(quantizer="rtn", group_size=32, sequences=2, sequence_length=32),
        learning=LearningSettings(draws=1),
        resume="never",
    )
    done = fit(request, Watching(see))
    assert begun.count("candidates") == 1  # never: what this very run has learned is not deleted
    assert begun.index("KV cache") < begun.index("solving") < begun.index("writing")
    assert [option.dtype for option in done.kv_options] == ["auto", "fp8"]
    best = min(done.kv_options, key=lambda option: option.total_loss or 0.0)
    assert done.plan is not None
    assert done.plan.request.kv_cache_dtype == best.dtype
    assert best.manifest is not None
    assert Manifest.read(tmp_path / "out" / "gamma_manifest.json") == done.manifest == best.manifest
    assert Plan.read(tmp_path / "out" / "plan.json").request == done.plan.request
    assert done.serve.startswith(f"vllm serve {tmp_path / 'out'}")


def test_what_needs_no_torch_does_not_load_it() -> None:
    program = "import sys; from allocator.pipeline import CandidateSettings, SolveSettings, resolve_model, solve_scores"
    code = f"{program}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
