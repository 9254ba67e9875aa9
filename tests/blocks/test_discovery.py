"""The structure of a family is found, and found again it is what the table says."""

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from allocator.blocks.discovery.expressions import Expressions
from allocator.blocks.discovery.table import TABLE, candidates, found_rules, found_wrapper, wrappers
from allocator.contract.errors import InputError
from allocator.model import read_inventory
from allocator.pipeline.discovering import discover
from tests.skips import lacking

ROOT = Path(__file__).parents[2]
AGAIN = {
    "LlamaForCausalLM": "biases by two keys",
    "Gemma3ForCausalLM": "windows by a period that config.json can say otherwise",
    "Phi3ForCausalLM": "fused on disk",
    "Starcoder2ForCausalLM": "code of transformers in vLLM",
    "Glm4MoeForCausalLM": "dense blocks before sparse ones, shared experts",
    "MixtralForCausalLM": "names that transformers changes",
    "Qwen3NextForCausalLM": "linear attention",
    "NemotronHForCausalLM": "blocks of four kinds, experts of a size of their own",
    "Lfm2ForCausalLM": "a size that its class computes",
    "Gemma4ForCausalLM": "heads by kind of block, keys that are values",
    "GptOssForCausalLM": "experts in one tensor, gate and up in turns",
}


@pytest.fixture(scope="module")
def table() -> dict:
    """The table, where the libraries it was made of are the installed ones."""
    made = json.loads(TABLE.read_text())
    assert importlib.metadata.version("transformers") == made["transformers"], "run `make architectures`"
    pytest.importorskip("vllm")
    installed = importlib.metadata.version("vllm").partition("+")[0]
    if installed != made["vllm"]:
        pytest.skip(lacking("vllm", f"the table was made of vLLM {made['vllm']}, this is {installed}"))
    return made


@pytest.mark.parametrize("architecture", AGAIN)
def test_the_table_is_what_the_installed_libraries_tell(table: dict, architecture: str) -> None:
    assert found_rules(architecture, candidates()[architecture]) == table["architectures"][architecture]


def test_a_multimodal_model_has_the_rules_of_its_language_model(table: dict) -> None:
    found = found_wrapper("Mistral3ForConditionalGeneration")
    assert found == table["architectures"]["Mistral3ForConditionalGeneration"]
    assert found["beside"] == ["multi_modal_projector.", "vision_tower."]


def test_the_table_has_every_architecture_that_both_libraries_know(table: dict) -> None:
    assert table["architectures"].keys() | table["refused"].keys() == candidates().keys() | wrappers().keys()


def test_a_size_is_told_by_the_keys_that_it_follows_from() -> None:
    keys = {
        "heads": (12, 20, 42, 16),
        "kv": (3, 10, 7, 8),
        "size": (88, 112, 96, 144),
        "wide": (1000, 1016, 1040, 1100),
    }
    found = Expressions(keys, {"kernel": 4})
    traces = list(zip(*keys.values(), strict=True))
    assert found.of(tuple(h * s + 2 * k * s for h, k, s, _ in traces)) == "heads*size+kv*size*2"
    assert found.of(tuple(2 * w + k for _, k, _, w in traces)) == "kv+wide*2"
    assert found.of((4, 4, 4, 4)) == "kernel"
    assert found.of((7, 7, 7, 9)) is None


def test_an_architecture_outside_the_table_is_found_on_the_users_machine(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tiny_model("qwen3")
    known = read_inventory(folder)
    _forget(monkeypatch, "Qwen3ForCausalLM")
    with pytest.raises(InputError, match="inspect --from-model"):
        read_inventory(folder)
    assert discover(folder) is not None
    found = read_inventory(folder)
    assert [m.name for m in found.modules] == [m.name for m in known.modules]


def _forget(monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    from allocator.model import architectures

    rules = {k: v for k, v in architectures.table().items() if k != architecture}
    monkeypatch.setattr(architectures, "table", lambda: rules)


def test_what_vllm_cannot_serve_is_refused_with_the_reason() -> None:
    pytest.importorskip("vllm")
    from allocator.blocks.discovery.generate import find_architecture

    with pytest.raises(InputError, match="vLLM has no model of this name"):
        find_architecture("codegen", "CodeGenForCausalLM")


def test_the_page_of_models_is_current() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "models" / "table.py", "--check"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
