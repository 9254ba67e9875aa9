"""Checkpoints and engines for the tests of serving, made once a session."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "benchmarks" / "demo" / "model"

_CYCLE = [
    # Three widths inside qkv with a 16-bit shard, and a 16-bit shard beside a quantized one in gate/up.
    {"q": (4, 64, True), "k": (3, 32, False), "v": (16, 0, True), "gate": (16, 0, True), "up": (6, 64, False)},
    # One kind each: qkv and gate/up become one GEMM.
    {"q": (5, 64, False), "k": (5, 64, False), "v": (5, 64, False), "gate": (8, 128, True), "up": (8, 128, True)},
    # Equal widths, different groups and symmetry; the 16-bit shard first.
    {"q": (16, 0, True), "k": (6, 32, True), "v": (6, 64, False), "gate": (4, 32, True), "up": (4, 64, True)},
    # No width below 16 in qkv.
    {"q": (16, 0, True), "k": (16, 0, True), "v": (16, 0, True), "gate": (2, 32, False), "up": (5, 128, True)},
]
_EXPERT_PARTS = ["gate", "up", "down", "w1", "w3", "w2", "gate_up"]
_OTHERS = [(8, 128, False), (16, 0, True), (3, 64, True), (6, 32, False), (4, 128, True)]


def mixed(module: str) -> tuple[int, int, bool]:
    """The width, group size and symmetry of a module: every kind of neighbourhood occurs."""
    if "layers." not in module:
        return 16, 0, True
    layer, leaf = int(module.partition("layers.")[2].partition(".")[0]), module.rpartition(".")[2].removesuffix("_proj")
    if ".experts." in module:  # gate and up of every expert differ, in other ways for each
        return _OTHERS[(layer + int(module.split(".")[-2]) * 3 + _EXPERT_PARTS.index(leaf) % 3) % len(_OTHERS)]
    choice = _CYCLE[layer % len(_CYCLE)].get(leaf)
    return choice or _OTHERS[(layer + (leaf == "down") * 2) % len(_OTHERS)]


def mixed_with_vocabulary(module: str) -> tuple[int, int, bool]:
    """As `mixed`, and embedding and lm_head below 16 bits as well."""
    return {"embed_tokens": (5, 64, False), "embeddings": (5, 64, False), "lm_head": (6, 32, True)}.get(
        module.rpartition(".")[2]
    ) or mixed(module)


@pytest.fixture(scope="session")
def serving():
    """Skips where vLLM is not installed; fails where it does not see the plugin."""
    pytest.importorskip("vllm")
    if not importlib.metadata.entry_points(group="vllm.general_plugins", name="gamma"):
        pytest.fail("vLLM does not see the plugin: install this repository (pip install --no-deps -e .)")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, trained_model, exported, learned_cut, serving):
    """Model name -> (gamma checkpoint, the same model as float32 weights for transformers).

    "exported" is the demo model through `learn`, `solve` and `export`, "cut" the same with channel blocks; the others
    are written by the tests, with every neighbourhood of widths.
    """
    from tests.e2e.make_checkpoint import make_checkpoint, widen_heads, write_dequantized

    widened = {"babyllama105": 2, "stories260K": 4}  # head sizes 16 and 8; vLLM's CPU attention begins at 32
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            if name in ("exported", "cut"):
                gamma = exported(3.5)[1] if name == "exported" else learned_cut[2]
                made[name] = gamma, _dequantized(gamma, tmp_path_factory.mktemp(name))
                return made[name]
            model = DEMO if name == "demo" else trained_model(name)
            folder = tmp_path_factory.mktemp(name)
            if name in widened:
                widen_heads(model, folder / "wide", widened[name])
                model = folder / "wide"
            make_checkpoint(model, folder / "gamma", mixed_with_vocabulary if name == "babyllama105" else mixed)
            write_dequantized(folder / "gamma", folder / "dequantized")
            made[name] = folder / "gamma", folder / "dequantized"
        return made[name]

    return get


@pytest.fixture(scope="session")
def learned(tmp_path_factory):
    """The folder in which `learn` worked on the demo model, for seconds."""
    from allocator.pipeline import CandidateSettings, learn
    from allocator.score import LearningSettings

    work = tmp_path_factory.mktemp("learned")
    candidates = CandidateSettings(quantizer="rtn", group_size=64, sequences=4, sequence_length=64)
    learn(DEMO, work, candidates, LearningSettings(batch_tokens=256))
    return work


@pytest.fixture(scope="session")
def learned_cut(tmp_path_factory):
    """The same with channel blocks, solved and exported: (bank, manifest file, checkpoint)."""
    from allocator.pipeline import CandidateSettings, SolveSettings, export, learn, solve_scores
    from allocator.score import LearningSettings
    from allocator.solve import Rules

    work = tmp_path_factory.mktemp("learned-cut")
    candidates = CandidateSettings(
        quantizer="rtn", group_size=64, sequences=4, sequence_length=64, widths=(2, 3, 5, 16), channel_blocks=4
    )
    result = learn(DEMO, work, candidates, LearningSettings(batch_tokens=256))
    manifest = solve_scores(result.scores, SolveSettings(average_bits=3.7, rules=Rules({"*.0.mlp.up_proj.rows.3": 16})))
    manifest.write(work / "manifest.json")
    export(manifest, DEMO, result.bank_folder, work / "gamma")
    return result.bank_folder, work / "manifest.json", work / "gamma"


@pytest.fixture(scope="session")
def exported(learned, tmp_path_factory):
    """Average bits -> (manifest file, checkpoint of the real pipeline)."""
    from allocator.contract.scores import Scores
    from allocator.pipeline import SolveSettings, export, solve_scores

    made: dict[float, tuple[Path, Path]] = {}

    def get(average_bits: float) -> tuple[Path, Path]:
        if average_bits not in made:
            folder = tmp_path_factory.mktemp("exported")
            manifest = solve_scores(Scores.read(learned / "scores.json"), SolveSettings(average_bits=average_bits))
            manifest.write(folder / "manifest.json")
            export(manifest, DEMO, learned / "bank", folder / "gamma")
            made[average_bits] = folder / "manifest.json", folder / "gamma"
        return made[average_bits]

    return get


def _dequantized(checkpoint: Path, target: Path) -> Path:
    from allocator.evaluate import load_dequantized

    load_dequantized(checkpoint).save_pretrained(target)
    for path in DEMO.glob("tokenizer*"):
        shutil.copy(path, target)
    return target


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """For all processes of vLLM. They share what vLLM finds out of model classes, and leave the user's cache alone."""
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}  # spinning hurts on a busy machine
    return os.environ | threads | {"VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="session")
def run_engines(environment):
    """Runs `engine.py` on jobs in one process of its own; gives the results by job name.

    With `stock`, vLLM loads no plugin: ours is not there for it.
    """

    def run(jobs: list[dict], folder: Path, stock: bool = False) -> dict[str, dict]:
        (folder / "jobs.json").write_text(json.dumps(jobs))
        script = Path(__file__).with_name("engine.py")
        with (folder / "engine.log").open("w") as log:
            command = [sys.executable, script, folder / "jobs.json", folder / "results.json"]
            variables = environment | ({"VLLM_PLUGINS": ""} if stock else {})
            process = subprocess.run(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
        saved = folder / "results.json"
        results = json.loads(saved.read_text()) if saved.exists() else {}
        if len(results) != len(jobs):
            tail = (folder / "engine.log").read_text()[-3000:]
            pytest.fail(f"the engines' process ended with {process.returncode} after {list(results)}:\n{tail}")
        return results

    return run


def succeeded(result: dict) -> list:
    """The answers of a job that was not to fail."""
    assert "error" not in result, result["error"]
    return result["steps"]
