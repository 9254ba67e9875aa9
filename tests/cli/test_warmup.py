"""`gamma warmup` as a user meets it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.test_cli import gamma
from tests.e2e.make_checkpoint import make_checkpoint

WIDTHS = {"q_proj": 4, "k_proj": 4, "v_proj": 3, "gate_proj": 5, "up_proj": 5}


@pytest.fixture
def checkpoint(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    def choose(name: str) -> tuple[int, int, bool]:
        leaf = name.rpartition(".")[2]
        return (16, 0, True) if leaf in ("embed_tokens", "lm_head") else (WIDTHS.get(leaf, 2), 32, False)

    make_checkpoint(tiny_model("llama"), tmp_path / "gamma", choose)
    return tmp_path / "gamma"


def test_neighbours_of_one_width_are_one_product(checkpoint: Path) -> None:
    listed = json.loads(gamma("warmup", checkpoint, "--list", "--json").stdout)["segments"]
    products = {(s["rows"], s["columns"], s["num_bits"]): s["count"] for s in listed}
    # q and k (64 + 32 rows) together, v alone, o, gate and up together, down; in two blocks
    assert products == {(96, 64, 4): 2, (32, 64, 3): 2, (64, 64, 2): 2, (192, 64, 5): 2, (64, 96, 2): 2}


def test_ranks_that_would_cut_through_a_group_are_refused(checkpoint: Path) -> None:
    refused = gamma("warmup", checkpoint, "--list", "--tensor-parallel-size", 2, code=2)
    assert "down_proj: tensor_parallel_size 2 gives each rank 48 of 96 in_features" in refused.stderr


def test_it_says_what_was_compiled(checkpoint: Path) -> None:
    pytest.importorskip("vllm")
    assert any(kernel in gamma("warmup", checkpoint).stdout for kernel in ("native: ", "nothing to compile"))


def test_a_model_at_16_bits_has_nothing_to_warm_up(tiny_model: Callable[[str], Path]) -> None:
    assert "no gamma checkpoint" in gamma("warmup", tiny_model("llama"), code=2).stderr
