"""Candidates are as good as their width allows, and are what a server computes from the packed tensors."""

from importlib.metadata import EntryPoint, EntryPoints
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from allocator.contract.errors import InputError
from allocator.contract.layout import ModuleFormat, module_tensors
from allocator.quantizers import InputStatistics, get_quantizer, quantizer_names, registry
from allocator.quantizers.rtn import RoundToNearest

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
@pytest.mark.parametrize("name", ["rtn", "gptq"])
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


@pytest.mark.parametrize("name", ["rtn", "gptq"])
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


@pytest.mark.parametrize("name", ["rtn", "gptq"])
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
    entry = EntryPoint("mine", "allocator.quantizers.rtn:RoundToNearest", "gamma.quantizers")
    monkeypatch.setattr(registry, "entry_points", lambda group: EntryPoints([entry]).select(group=group))
    assert "mine" in quantizer_names()
    assert isinstance(get_quantizer("mine"), RoundToNearest)


def test_an_unknown_quantizer_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="choose from rtn, gptq"):
        get_quantizer("magic")
