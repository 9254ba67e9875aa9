"""Assignments measured from the bank are what their checkpoints are."""

import json
import subprocess
import sys

import pytest

from allocator.blocks import BlockStream
from allocator.contract.errors import ContractError
from allocator.contract.manifest import Manifest
from allocator.evaluate import Student, load_dequantized, measure_divergence
from allocator.model import read_inventory
from allocator.quantize import BankReader


def gamma(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "allocator.cli.main", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def fitted(tiny_model, tmp_path_factory):
    """A work folder, its model, and a checkpoint."""
    folder = tmp_path_factory.mktemp("fitted")
    options = ["--group-size", "32", "--quantizer", "rtn", "--sequences", "4", "--sequence-length", "32"]
    options += ["--average-bits", "4", "--work", folder / "work", "--out", folder / "checkpoint"]
    gamma("fit", tiny_model("llama"), *options)
    return folder, tiny_model("llama")


def test_a_measured_assignment_is_its_checkpoint(fitted):
    import torch
    from transformers import AutoModelForCausalLM

    folder, model = fitted
    tokens = torch.randint(1, 250, (2, 40), generator=torch.Generator().manual_seed(0))
    manifest = Manifest.read(folder / "checkpoint/gamma_manifest.json")
    student = Student(BlockStream(read_inventory(model)), BankReader(folder / "work/bank"), tokens)
    measured = student.losses(manifest.modules)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    by_checkpoint = measure_divergence(original, load_dequantized(folder / "checkpoint"), tokens)
    assert float(measured.kl.mean()) == pytest.approx(by_checkpoint.kl, rel=1e-4)
    assert float(measured.nll.mean().exp()) == pytest.approx(by_checkpoint.perplexity, rel=1e-5)
    full = {name: form.model_copy(update={"num_bits": 16, "group_size": None, "symmetric": None})
            for name, form in manifest.modules.items()}  # fmt: skip
    assert float(student.losses(full).kl.abs().max()) < 1e-9
    assert torch.equal(student.losses(manifest.modules).kl, measured.kl)
    with pytest.raises(ContractError, match=r"no\.such"):
        student.losses({"no.such": full["lm_head"]})
    name = next(name for name, form in manifest.modules.items() if form.quantized)
    coarser = manifest.modules[name].model_copy(update={"group_size": 64})
    with pytest.raises(ContractError, match=f"{name}: the bank .* group_size 64"):
        student.losses({name: coarser})


def test_a_sweep_measures_what_it_solves(fitted, tmp_path):
    folder, model = fitted
    text = tmp_path / "text.txt"
    text.write_text("some words that nobody calibrated on, again and again. " * 80)
    options = ["--from", "3.5bits", "--to", "6bits", "--points", "3", "--measure", model, "--text", text]
    options += ["--sequences", "4", "--sequence-length", "32"]
    scores = folder / "work/scores.json"
    rows = json.loads(gamma("sweep", scores, *options, "--json", f"--figure={tmp_path / 'm.svg'}"))["rows"]
    measured = [row["measured_loss"] for row in rows]
    assert measured == sorted(measured, reverse=True)
    assert all(loss > 0 for loss in measured)
    assert all(row["uniform_measured_loss"] > 0 for row in rows)
    assert "solved, measured" in (tmp_path / "m.svg").read_text()
    assert max(map(len, gamma("sweep", scores, *options).splitlines())) <= 80
    assert "--text" in gamma("sweep", scores, *options[:-6], code=2)
