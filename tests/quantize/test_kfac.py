"""Rounding against the Fisher matrix of outputs too: less is lost, and gptq's codes come where outputs say nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allocator.contract.errors import InputError, StoppedError
from allocator.contract.layout import ModuleFormat
from allocator.quantize import get_quantizer
from allocator.quantize.quantizer import InputStatistics
from tests.quantize.test_learned_rounding import Stopping, build, uniform_kl


def moments(features: int, seed: int) -> torch.Tensor:
    """Of features that have much to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(4 * features, features, generator=generator) @ torch.randn(
        features, features, generator=generator
    )
    return mixed.T @ mixed / len(mixed)


def losses(rows: int, num_bits: int, symmetric: bool, **settings: float) -> tuple[float, float]:
    """tr(F E H E^T) of kfac's candidate and of gptq's."""
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))
    form = ModuleFormat(shape=(rows, 64), num_bits=num_bits, group_size=32, symmetric=symmetric)
    inputs, outputs = moments(64, 2), moments(rows, 3)
    found = []
    for spec in ("kfac:" + ",".join(f"{key}={value}" for key, value in settings.items()), "gptq"):
        known = InputStatistics(hessian=inputs.clone(), tokens=1, output_moments=[outputs])
        error = weight - get_quantizer(spec).quantize(weight, form, torch.float16, known).dequantized(num_bits)
        found.append(float(((outputs @ error @ inputs) * error).sum()))
    return found[0], found[1]


@pytest.mark.parametrize("rows", [48, 31, 50])
@pytest.mark.parametrize(("num_bits", "symmetric"), [(2, False), (3, True), (4, False)])
def test_less_is_lost_than_by_rows_alone(rows: int, num_bits: int, symmetric: bool) -> None:
    once, again, by_rows = (
        losses(rows, num_bits, symmetric, passes=0)[0],
        *losses(rows, num_bits, symmetric, passes=4),
    )
    assert once < 0.9 * by_rows
    assert again <= once, "of all passes the best is kept"


@pytest.mark.parametrize("symmetric", [True, False])
def test_outputs_that_have_nothing_to_do_with_each_other_give_the_codes_of_gptq(symmetric: bool) -> None:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(4))
    form = ModuleFormat(shape=(24, 96), num_bits=3, group_size=32, symmetric=symmetric)
    found = []
    for spec, outputs in (("kfac:damping=0.01,passes=2", [torch.eye(24)]), ("gptq", [])):
        known = InputStatistics(hessian=moments(96, 5), tokens=1, output_moments=outputs)
        found.append(get_quantizer(spec).quantize(weight, form, torch.float16, known))
    ours, theirs = found
    assert torch.equal(ours.scale, theirs.scale)
    assert torch.equal(ours.codes, theirs.codes)
    assert symmetric or torch.equal(ours.zero_point, theirs.zero_point)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gemma3"])
def test_a_model_of_such_candidates_is_better(kind: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model(kind)
    for spec in ("gptq", "kfac"):
        build(model, tmp_path / spec, spec)
    kls = [uniform_kl(model, tmp_path / spec, 2) for spec in ("kfac", "gptq")]
    assert kls[0] < 0.95 * kls[1], kls


def test_a_bank_that_was_stopped_ends_in_the_same_bytes(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model("llama")
    whole = build(model, tmp_path / "whole", "kfac")
    (tmp_path / "parts").mkdir()
    for _ in range(60):
        journal = Stopping(tmp_path / "parts" / "journal")
        journal.left = 3
        try:
            parts = build(model, tmp_path / "parts", "kfac", journal)
            break
        except StoppedError:
            continue
    assert parts == whole
    assert not list((tmp_path / "parts" / "hidden").glob("candidates-*")), "gradients are not left behind"


@pytest.mark.parametrize("spec", ["kfac:passes=-1", "kfac:passes=1.5", "kfac:up_to_bits=0", "kfac:damping=0"])
def test_settings_that_make_no_sense_are_refused(spec: str) -> None:
    with pytest.raises(InputError, match="must be"):
        get_quantizer(spec)
