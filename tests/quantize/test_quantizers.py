"""Candidates are as good as their width allows, and are what a server computes from the packed tensors."""

from importlib.metadata import EntryPoint, EntryPoints
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from allocator.contract.errors import InputError
from allocator.contract.layout import ModuleFormat, module_tensors
from allocator.quantize import InputStatistics, get_quantizer, quantizer_names, registry
from allocator.quantize.ldl import factorize
from allocator.quantize.rtn import RoundToNearest

WIDTHS = (2, 3, 4, 5, 6, 8)


def correlated_inputs(features: int, tokens: int = 512) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(features, features, generator=generator) / features**0.5
    return torch.randn(tokens, features, generator=generator) @ (mix + 0.3)


def weight_and_statistics() -> tuple[Tensor, Tensor, InputStatistics]:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    x = correlated_inputs(128)
    return weight, x, InputStatistics(x.T @ x, len(x))


def form(num_bits: int, group_size: int = 64, symmetric: bool = False) -> ModuleFormat:
    return ModuleFormat(shape=(48, 128), num_bits=num_bits, group_size=group_size, symmetric=symmetric)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", ["rtn", "mse", "gptq"])
def test_output_error_shrinks_with_width(name: str, symmetric: bool) -> None:
    weight, x, statistics = weight_and_statistics()
    quantizer = get_quantizer(name)
    errors = []
    for num_bits in WIDTHS:
        module = quantizer.quantize(weight, form(num_bits, symmetric=symmetric), torch.bfloat16, statistics)
        errors.append(float(((module.dequantized(num_bits) - weight) @ x.T).square().mean()))
    assert all(wider < narrower / 2 for narrower, wider in pairwise(errors)), errors


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_rtn_asymmetric_error_is_at_most_about_half_a_step(num_bits: int) -> None:
    weight, _, _ = weight_and_statistics()
    module = RoundToNearest().quantize(weight, form(num_bits), torch.bfloat16)
    scale = module.scale.float().repeat_interleave(64, dim=1)
    # Half a step, and what rounding the zero point and the 16-bit scale shift the ends of the range by.
    assert ((module.dequantized(num_bits) - weight).abs() <= scale * (1.01 + 2**num_bits / 256)).all()


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_gptq_beats_rtn_on_correlated_inputs(num_bits: int) -> None:
    weight, x, statistics = weight_and_statistics()
    losses = {}
    for name in ("rtn", "gptq"):
        module = get_quantizer(name).quantize(weight, form(num_bits), torch.bfloat16, statistics)
        losses[name] = float(((module.dequantized(num_bits) - weight) @ x.T).square().mean())
    assert losses["gptq"] < 0.8 * losses["rtn"]


@pytest.mark.parametrize("name", ["rtn", "mse", "gptq"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_packed_tensors_have_the_declared_layout(name: str, symmetric: bool, dtype: str) -> None:
    weight, _, statistics = weight_and_statistics()
    torch_dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    module = get_quantizer(name).quantize(weight, form(3, 32, symmetric), torch_dtype, statistics)
    packed = module.packed(3)
    names = {torch.int32: "I32", torch.int64: "I64", torch.bfloat16: "BF16", torch.float16: "F16"}
    found = {(f"m.{part}", names[t.dtype], tuple(t.shape)) for part, t in packed.items()}
    assert found == {(t.name, t.dtype, t.shape) for t in module_tensors("m", form(3, 32, symmetric), dtype)}


@pytest.mark.parametrize("name", ["rtn", "mse", "gptq"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_degenerate_weights_stay_finite(name: str, dtype: torch.dtype) -> None:
    """All zero, constant, tiny and huge rows, and inputs that are never seen: no NaN reaches a server."""
    weight = torch.zeros(48, 128)
    weight[1] = 3.0
    weight[2] = 1e-9
    weight[3] = -6e4
    weight[4, ::2] = 1.0
    dead = InputStatistics(torch.zeros(128, 128), 64)
    for num_bits in WIDTHS:
        module = get_quantizer(name).quantize(weight, form(num_bits), dtype, dead)
        restored = module.dequantized(num_bits)
        assert torch.isfinite(restored).all()
        assert (restored[0] == 0).all()


def test_a_third_party_registers_a_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("mine", "allocator.quantize.rtn:RoundToNearest", "gamma.quantizers")
    monkeypatch.setattr(registry, "entry_points", lambda group: EntryPoints([entry]).select(group=group))
    assert "mine" in quantizer_names()
    assert isinstance(get_quantizer("mine"), RoundToNearest)


def test_an_unknown_quantizer_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="choose from rtn, mse, gptq"):
        get_quantizer("magic")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_mse_beats_rtn_in_the_error_it_minimises(num_bits: int, symmetric: bool) -> None:
    weight, x, _ = weight_and_statistics()
    x = x * torch.linspace(0.1, 4, 128)  # channels of very different size
    statistics = InputStatistics(None, len(x), x.square().sum(0))
    losses = {}
    for name in ("rtn", "mse"):
        module = get_quantizer(name).quantize(weight, form(num_bits, symmetric=symmetric), torch.bfloat16, statistics)
        losses[name] = float(((module.dequantized(num_bits) - weight).square() * statistics.moments).sum())
    assert losses["mse"] < 0.95 * losses["rtn"]


def test_the_factors_give_back_the_damped_hessian() -> None:
    """H = U D U^T, across stripes, and the same candidates as the textbook's inverse gives."""
    x = correlated_inputs(1200, 3000)
    hessian = x.T @ x
    found = factorize(InputStatistics(hessian.clone(), len(x)), 0.01)
    upper = found.factor.triu(1).double() + torch.eye(1200, dtype=torch.float64)
    mean = hessian / len(x)
    damped = mean + 0.01 * torch.diagonal(mean).mean() * torch.eye(1200)
    torch.testing.assert_close(((upper * found.pivots) @ upper.T).float(), damped, rtol=1e-4, atol=1e-4)


def test_a_hessian_that_cannot_be_factorised_is_damped_more() -> None:
    hessian = torch.ones(64, 64) - 2 * torch.eye(64)  # not even semi-definite
    found = factorize(InputStatistics(hessian.abs().mul(-1).fill_diagonal_(1.0), 1), 1e-6)
    assert torch.isfinite(found.factor.triu()).all()
    assert (found.pivots > 0).all()


def test_large_modules_are_quantized_in_stripes_to_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, statistics = weight_and_statistics()
    for name in ("rtn", "mse", "gptq"):
        whole = get_quantizer(name).quantize(weight, form(3), torch.bfloat16, statistics)
        with monkeypatch.context() as patch:
            patch.setattr("allocator.quantize.quantizer._STRIPE_WEIGHTS", 7 * 128)
            striped = get_quantizer(name).quantize(weight, form(3), torch.bfloat16, statistics)
        assert torch.equal(whole.scale, striped.scale)
        assert (whole.codes != striped.codes).float().mean() < 0.001  # sums of products in another order


def test_settings_are_part_of_the_name() -> None:
    plain, damped = get_quantizer("gptq"), get_quantizer("gptq:damping=0.05")
    assert (plain.name, damped.name) == ("gptq", "gptq:damping=0.05")
    weight, _, statistics = weight_and_statistics()
    one = plain.quantize(weight, form(2), torch.bfloat16, statistics)
    other = damped.quantize(weight, form(2), torch.bfloat16, weight_and_statistics()[2])
    assert not torch.equal(one.codes, other.codes)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gptq:dumping=0.1", "it has damping"),
        ("rtn:damping=0.1", "it has none"),
        ("gptq:damping=much", "setting=number"),
        ("gptq:damping=-1", "must be above 0"),
        ("magic:x=1", "choose from"),
    ],
)
def test_wrong_settings_are_explained(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        get_quantizer(spec)
