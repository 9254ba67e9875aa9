# ruff: noqa: E402 - torch and vllm are optional: imported only when they are there
"""Whole layers of vLLM, loaded the way vLLM loads them, for every rank."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from allocator.contract.errors import ContractError
from allocator.contract.packing import pack_zero_points, unpack_zero_points
from gamma_vllm.parameters import join_zero_points, slice_tensor
from gamma_vllm.shards import CheckpointModule, Shard
from tests.gamma_vllm.layers import declare, gamma_config, load


@pytest.fixture(autouse=True)
def reference_kernel(monkeypatch):
    monkeypatch.setenv("GAMMA_KERNEL", "torch")


QKV_IDS = {"a.q_proj": "q", "a.k_proj": "k", "a.v_proj": "v"}


def qkv_modules(heads=4, kv_heads=2, head_size=8, hidden=64, kinds=((4,), (3, 32, False), (16,))):
    rows = (heads * head_size, kv_heads * head_size, kv_heads * head_size)
    return {n: declare(r, hidden, *k) for n, r, k in zip(QKV_IDS, rows, kinds, strict=True)}


def qkv_layer(config, bias=False):
    return QKVParallelLinear(64, 8, 4, 2, bias=bias, quant_config=config, prefix="a.qkv_proj")


KINDS = {
    "mixed with 16 bits": ((4,), (3, 32, False), (16,)),
    "asymmetric of one kind": ((5, 64, False),) * 3,
    "two of one kind": ((2, 32, False), (2, 32, False), (6, 64, True)),
    "16 bits first": ((16,), (8, 64, True), (8, 64, False)),
}


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_qkv_of_every_rank_is_its_rows_of_the_whole(parallel, size, kinds):
    # 8 rows a head and rank: zero points of 3, 5 and 6 bits are cut inside words; with 4 ranks KV heads repeat.
    modules = qkv_modules(kinds=kinds)
    x = torch.randn(3, 64)
    for rank in range(size):
        parallel(rank, size)
        layer = qkv_layer(gamma_config(modules))
        weights = load(layer, modules, QKV_IDS)
        layer.quant_method.process_weights_after_loading(layer)
        expected = []
        for name, weight in weights.items():
            copies = max(1, size // 2) if name != "a.q_proj" else 1
            expected.append(x @ weight.chunk(size // copies)[rank // copies].T)
        output, _ = layer(x)
        torch.testing.assert_close(output, torch.cat(expected, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_row_parallel_ranks_add_up(parallel, size):
    modules = {"a.o_proj": declare(24, 256, 3, 64, False)}
    x = torch.randn(3, 256)
    total = torch.zeros(3, 24)
    for rank in range(size):
        parallel(rank, size)
        layer = RowParallelLinear(
            256, 24, bias=False, quant_config=gamma_config(modules), prefix="a.o_proj", reduce_results=False
        )
        weights = load(layer, modules, {})
        layer.quant_method.process_weights_after_loading(layer)
        total += layer(x.chunk(size, -1)[rank])[0]
    torch.testing.assert_close(total, x @ weights["a.o_proj"].T, rtol=1e-4, atol=1e-4)


def test_replicated_layers_are_whole_on_every_rank(parallel):
    parallel(1, 2)
    modules = {"a.router": declare(24, 64, 5, 32, False)}
    layer = ReplicatedLinear(64, 24, bias=False, quant_config=gamma_config(modules), prefix="a.router")
    weights = load(layer, modules, {})
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x)[0], x @ weights["a.router"].T, rtol=1e-5, atol=1e-5)


def test_gate_and_up_of_a_rank(parallel):
    parallel(1, 2)
    modules = {"a.gate_proj": declare(48, 64, 16), "a.up_proj": declare(48, 64, 5, 64, False)}
    config = gamma_config(modules)
    layer = MergedColumnParallelLinear(64, [48, 48], bias=False, quant_config=config, prefix="a.gate_up_proj")
    weights = load(layer, modules, {"a.gate_proj": 0, "a.up_proj": 1})
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, 64)
    expected = torch.cat([x @ w[24:].T for w in weights.values()], -1)
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_module_fused_on_disk_is_loaded_without_a_shard_id(parallel):
    parallel(1, 2)
    modules = {"a.qkv_proj": declare(64, 64, 5, 32, False)}
    layer = qkv_layer(gamma_config(modules))
    whole = load(layer, modules, {})["a.qkv_proj"]
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, 64)
    rows = torch.cat([whole[16:32], whole[40:48], whole[56:64]])
    torch.testing.assert_close(layer(x)[0], x @ rows.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_bias_is_added_once(parallel, monkeypatch, kernel):
    monkeypatch.setenv("GAMMA_KERNEL", kernel)
    modules = qkv_modules()
    layer = qkv_layer(gamma_config(modules), bias=True)
    weights = load(layer, modules, QKV_IDS)
    torch.nn.init.normal_(layer.bias)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, 64)
    expected = F.linear(x, torch.cat(list(weights.values())), layer.bias)
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_nothing_is_kept_twice(parallel, monkeypatch, kernel):
    monkeypatch.setenv("GAMMA_KERNEL", kernel)
    modules = qkv_modules(kinds=((4,), (4,), (3,)))
    layer = qkv_layer(gamma_config(modules))
    load(layer, modules, QKV_IDS)
    kept_before = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    layer.quant_method.process_weights_after_loading(layer)
    names = set(dict(layer.named_parameters()))
    assert layer.weight_packed.numel() == 0  # LoRA asks it for the device
    assert not hasattr(layer, "weight")
    assert not hasattr(layer, "weight_scale")
    if layer.quant_method.kernel.name in ("torch", "native"):
        assert names == {"weight_packed", *(f"gamma_{i}_{n}" for i in (0, 1) for n in ("packed", "scale"))}
        assert {p.untyped_storage().data_ptr() for p in layer.parameters() if p.numel()} <= kept_before
    else:
        assert names == {"weight_packed", "gamma_0_blob", "gamma_1_blob"}


def test_a_layer_of_sixteen_bit_shards_is_an_ordinary_layer(parallel):
    layer = qkv_layer(gamma_config(qkv_modules(kinds=((16,),) * 3)))
    assert type(layer.quant_method) is UnquantizedLinearMethod


def test_a_tensor_that_never_came_is_named(parallel):
    modules = qkv_modules()
    layer = qkv_layer(gamma_config(modules))
    load(layer, {n: m for n, m in modules.items() if n != "a.k_proj"}, QKV_IDS)
    with pytest.raises(ContractError, match=r"a\.k_proj\.weight_packed, .*a\.k_proj\.weight_zero_point"):
        layer.quant_method.process_weights_after_loading(layer)


def test_a_layer_without_any_tensor_is_refused(parallel):
    layer = qkv_layer(gamma_config(qkv_modules()))
    with pytest.raises(ContractError, match=r"a\.q_proj\.weight_packed"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("weight_packed", torch.zeros(32, 6, dtype=torch.int32), r"\[32, 6\] .* 4 bits .* \[32, 8\]"),
        ("weight_scale", torch.zeros(32, 1), r"\[32, 1\] .* 4 bits .* \[32, 2\]"),
        ("weight_shape", torch.tensor([32, 128]), r"\[32, 128\] .* \[32, 64\]"),
        ("weight_shape", torch.tensor([32]), r"\[1\] .* \[2\]"),
    ],
)
def test_a_tensor_of_another_shape_is_refused_with_both_shapes(parallel, part, tensor, message):
    layer = qkv_layer(gamma_config(qkv_modules()))
    parameter = getattr(layer, part)
    with pytest.raises(ContractError, match=rf"a\.q_proj\.{part}: .*{message}"):
        parameter.weight_loader(parameter, tensor, "q")


def test_a_tensor_that_the_declared_width_does_not_have_is_refused(parallel):
    layer = qkv_layer(gamma_config(qkv_modules()))
    with pytest.raises(ContractError, match=r"a\.qkv_proj: .* weight_zero_point for shard 0"):
        layer.weight_zero_point.weight_loader(layer.weight_zero_point, torch.zeros(4, 2), "q")


@settings(deadline=None)
@given(st.data(), st.sampled_from([2, 3, 4, 5, 6, 8]), st.integers(1, 90))
def test_zero_points_can_be_cut_and_joined_at_any_row(data, num_bits, rows):
    zero_points = torch.randint(0, 1 << num_bits, (rows, 3), generator=torch.Generator().manual_seed(rows))
    module = CheckpointModule("m", declare(rows, 96, num_bits, 32, False))
    packed = pack_zero_points(zero_points, num_bits)
    cut = data.draw(st.integers(0, rows - 1))
    parts, counts = [], []
    for start, stop in ((0, cut), (cut, rows)):
        if stop > start:
            part = slice_tensor(Shard(module, start, stop - start, 32, 64), "weight_zero_point", packed)
            assert torch.equal(unpack_zero_points(part, num_bits, stop - start), zero_points[start:stop, 1:])
            parts.append(part)
            counts.append(stop - start)
    joined = join_zero_points(parts, counts, num_bits)
    assert torch.equal(joined, packed[:, 1:])
