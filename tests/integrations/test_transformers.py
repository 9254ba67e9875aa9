"""Gamma checkpoints in Hugging Face transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import allocator.integrations.transformers as integration
from allocator.contract.errors import ContractError
from allocator.evaluate import load_dequantized
from tests.e2e.make_checkpoint import make_checkpoint

TOKENS = torch.arange(48).unsqueeze(0)
WIDTHS = {"q_proj": (3, 32, False), "k_proj": (2, 32, True), "v_proj": (16, 0, True), "down_proj": (8, 32, True)}
VOCABULARY = {"embed_tokens": (5, 32, False), "lm_head": (6, 64, True)}


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    """A checkpoint of a tiny model with several widths; with `vocabulary` its embedding and lm_head too."""

    def make(kind: str, vocabulary: bool) -> Path:
        widths = WIDTHS | (VOCABULARY if vocabulary else dict.fromkeys(VOCABULARY, (16, 0, True)))
        folder = tmp_path_factory.mktemp(kind) / "gamma"
        make_checkpoint(tiny_model(kind), folder, lambda name: widths.get(name.rpartition(".")[2], (4, 32, False)))
        return folder

    return make


@pytest.mark.parametrize("vocabulary", [False, True], ids=["linear", "vocabulary"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen2"])  # untied, tied, with biases
def test_logits_are_those_of_the_dequantized_model(kind, vocabulary, checkpoint):
    folder = checkpoint(kind, vocabulary)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(model(TOKENS).logits, load_dequantized(folder)(TOKENS).logits)
    q = model.model.layers[0].self_attn.q_proj
    assert isinstance(q, integration.PackedLinear)
    assert q.weight_packed.dtype == torch.int32
    assert model.generate(TOKENS[:, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 7)


def test_saved_again_it_is_the_same_checkpoint(checkpoint, tmp_path):
    folder = checkpoint("qwen3", True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
    assert config == json.loads((folder / "config.json").read_text())["quantization_config"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(model(TOKENS).logits, again(TOKENS).logits)


def test_scales_are_not_rounded_to_the_dtype_of_the_model(checkpoint):
    """Float16 cannot hold small bfloat16 scales."""
    folder = checkpoint("llama", False)
    exact = load_dequantized(folder).model.layers[0].self_attn.q_proj.weight
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.dequantized(), exact)


def test_a_module_that_transformers_does_not_have_is_named(checkpoint):
    folder = checkpoint("llama", False)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    modules = config["quantization_config"]["modules"]
    modules["model.layers.7.mlp.up_proj"] = modules["model.layers.0.mlp.up_proj"]
    path.write_text(json.dumps(config))
    with pytest.raises(ContractError, match=r"model\.layers\.7\.mlp\.up_proj: transformers has none in this place"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.slow
def test_another_program_runs_with_gamma_known_to_transformers(checkpoint, tmp_path):
    program = tmp_path / "reads_a_checkpoint.py"
    program.write_text(
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj).__name__)\n"
    )
    command = [sys.executable, "-m", "allocator.integrations", program.stem, checkpoint("llama", False)]
    paths = [str(tmp_path), *filter(None, sys.path)]
    environment = {"PYTHONPATH": ":".join(paths), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "PackedLinear\n", done.stderr
