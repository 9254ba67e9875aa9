"""Numbers that are not finite are refused where they first arise, by the name of the tensor, module or block."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from allocator.contract.errors import ContractError, InputError
from allocator.contract.layout import ModuleFormat
from allocator.pipeline import CandidateSettings, learn
from allocator.quantize import InputStatistics, get_quantizer
from allocator.score import LearningSettings
from allocator.score import learn as learning
from allocator.score.tables import Table

SMALL = {"group_size": 32, "widths": (2, 4, 16), "sequences": 2, "sequence_length": 16}


def changed(model: Path, out: Path, name: str, change: Callable[[torch.Tensor], None]) -> Path:
    folder = Path(shutil.copytree(model, out))
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "value", "quantizer", "place"),
    [
        ("model.layers.1.mlp.up_proj.weight", torch.nan, "gptq", "NaN in row 3, column 5"),
        ("model.embed_tokens.weight", -torch.inf, "rtn", "infinity in row 3, column 5"),
        ("model.norm.weight", torch.nan, "mse", "NaN in row 3"),
        ("model.layers.0.self_attn.q_proj.bias", torch.inf, "rtn", "infinity in row 3"),
    ],
)
def test_a_weight_is_refused_before_anything_is_computed(
    name: str, value: float, quantizer: str, place: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    def change(tensor: torch.Tensor) -> None:
        tensor[(3, 5)[: tensor.dim()]] = value

    model = changed(tiny_model("qwen2"), tmp_path / "model", name, change)
    with pytest.raises(ContractError, match=f"tensor {name} has {place};"):
        learn(model, tmp_path / "work", CandidateSettings(quantizer=quantizer, **SMALL), LearningSettings(draws=2))
    assert not list((tmp_path / "work").rglob("*.safetensors"))


def test_states_that_overflow_name_the_module(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = changed(
        tiny_model("llama"), tmp_path / "model", "model.layers.1.mlp.down_proj.weight", lambda w: w.fill_(3e38)
    )
    text = tmp_path / "text.txt"
    text.write_text("Some text to run the model on. " * 20)
    candidates = CandidateSettings(quantizer="rtn", calibration=[text], **SMALL)
    with pytest.raises(InputError, match=r"output of model\.layers\.1\.mlp\.down_proj"):
        learn(model, tmp_path / "work", candidates, LearningSettings(draws=2))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_gptq_ends_on_a_hessian_that_nothing_makes_positive(broken: float) -> None:
    form = ModuleFormat(shape=(8, 64), num_bits=4, group_size=32, symmetric=False)
    for hessian in (torch.full((64, 64), broken), torch.eye(64).index_fill(0, torch.tensor([3]), broken)):
        with pytest.raises(ArithmeticError):
            get_quantizer("gptq").quantize(torch.ones(8, 64), form, torch.bfloat16, InputStatistics(hessian, 64))
    indefinite = torch.eye(64)
    indefinite[3, 5] = indefinite[5, 3] = 1e37
    with pytest.raises(ArithmeticError, match="positive definite"):
        get_quantizer("gptq").quantize(torch.ones(8, 64), form, torch.bfloat16, InputStatistics(indefinite, 1))


def test_a_score_is_refused_with_module_and_method(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.0.mlp.up_proj"
    table = Table({name: torch.tensor([torch.nan, 1.0, 0.0])}, "none")
    monkeypatch.setitem(learning.METHODS, "uniform", lambda _task: table)
    candidates, settings = CandidateSettings(quantizer="rtn", **SMALL), LearningSettings(method="uniform")
    with pytest.raises(InputError, match=rf"{name}: its scores by uniform \(2 bits nan"):
        learn(tiny_model("llama"), tmp_path, candidates, settings)
