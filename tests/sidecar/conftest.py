"""A store with a tiny model that was really learned, and one with scores of Qwen3-32B's shapes."""

import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from allocator.contract.bank import ModelReference
from allocator.contract.layout import WIDTHS, ModuleFormat, module_bytes
from allocator.contract.scores import Candidate, ScoredModule, Scores
from allocator.sidecar.entry import Entry, Source
from allocator.sidecar.store import Store

from .serving import Running, running

LEARN = ["--group-size", "32", "--quantizer", "rtn", "--sequences", "4", "--sequence-length", "32"]
DIGEST = "sha256:" + "0" * 64


def gamma(*arguments: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "allocator.cli.main", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="session")
def learned(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Model folder and work folder of `gamma learn`."""
    model, work = tiny_model("qwen3"), tmp_path_factory.mktemp("learned") / "work"
    gamma("learn", model, "--out", work, *LEARN)
    return model, work


@pytest.fixture(scope="session")
def tiny_store(learned: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder store that offers the tiny model as "tiny". Only added to by the tests."""
    model, work = learned
    folder = tmp_path_factory.mktemp("store") / "store"
    gamma("store", "add", work, "--model", model, "--store", folder, "--name", "tiny")
    return folder


def scores_like(config: dict[str, int], name: str, architecture: str, seed: int = 0) -> Scores:
    """Scores as measuring gives them, for every linear module of a Qwen3-like model of these sizes."""
    draw = random.Random(seed)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes = {
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }  # fmt: skip
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
    fused["up_proj"] = "gate_up_proj"
    modules = {"model.embed_tokens": ScoredModule(candidates=[_candidate((config["vocab_size"], hidden), 16, 0.0)])}
    for block in range(config["num_hidden_layers"]):
        for local, shape in shapes.items():
            size = math.exp(draw.gauss(0, 1.5)) * (1 + block / 16)
            candidates = [
                _candidate(shape, b, 0.0 if b == 16 else size * 4.0**-b * math.exp(draw.gauss(0, 0.2))) for b in WIDTHS
            ]
            part, last = local.split(".")
            group = f"model.layers.{block}.{part}.{fused[last]}" if last in fused else None
            modules[f"model.layers.{block}.{local}"] = ScoredModule(fused_group=group, candidates=candidates)
    modules["lm_head"] = ScoredModule(candidates=[_candidate((config["vocab_size"], hidden), 16, 0.0)])
    return Scores(
        model=ModelReference(name=name, architecture=architecture, digest=DIGEST),
        bank_digest=DIGEST, dtype="BF16", method="measured", unit="nats", settings={"seed": seed},
        other_bytes=2 * hidden * (2 * config["num_hidden_layers"] + 1), modules=modules,
    )  # fmt: skip


def _candidate(shape: tuple[int, int], bits: int, score: float) -> Candidate:
    extra = {} if bits == 16 else {"group_size": 128, "symmetric": False}
    form = ModuleFormat(shape=shape, num_bits=bits, **extra)
    return Candidate(format=form, nbytes=module_bytes(form), score=score)


QWEN3_32B = {
    "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
}  # fmt: skip
QWEN3_CONFIG = QWEN3_32B | {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": False, "dtype": "bfloat16",
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "attention_bias": False,
    "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip


def add_scores_only(store: Store, scores: Scores, name: str, config: dict[str, object]) -> Entry:
    """An entry without a bank: enough for everything but checkpoints."""
    store.add_scores(scores)
    entry = Entry(
        name=name, model=scores.model, config=config, source=Source(kind="hub", location=f"org/{name}"),
        scores_digest=scores.digest, bank_digest=scores.bank_digest, method=scores.method, unit=scores.unit,
        quantizer="gptq", group_size=128, symmetric=False, widths=list(WIDTHS), modules=len(scores.modules),
        feasible_bytes=scores.feasible_bytes(), added="2026-01-01T00:00:00Z",
    )  # fmt: skip
    store.add_entry(entry)
    return entry


@pytest.fixture(scope="session")
def store(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder store that offers both; only added to."""
    folder = tmp_path_factory.mktemp("both") / "store"
    shutil.copytree(tiny_store, folder)
    scores = scores_like(QWEN3_32B, "Qwen3-32B", "Qwen3ForCausalLM")
    add_scores_only(Store(str(folder)), scores, "Qwen3-32B", QWEN3_CONFIG)
    return folder


@pytest.fixture(scope="session")
def sidecar(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One service for all tests that do not harm it."""
    with running(tmp_path_factory.mktemp("sidecar") / "log", "--store", store) as service:
        yield service
