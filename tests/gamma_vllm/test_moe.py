# ruff: noqa: E402 - torch and vllm are optional: imported only when they are there
"""Experts of different widths on every rank, against their dequantized weights."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

import torch.nn.functional as F
from torch import nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from allocator.contract.errors import ContractError
from gamma_vllm.moe import ExpertModules, GammaMoEMethod
from gamma_vllm.shards import CheckpointModule
from tests.gamma_vllm.layers import declare, stored_tensors

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 128, 4, 2
FORMS = [(4, 32, True), (3, 64, False), (16,), (8, 64, True), (2, 32, False), (3, 64, False), (5, 32, True)]
IDS = {"gate": "w1", "up": "w3", "down": "w2"}


@pytest.fixture(autouse=True)
def reference_kernel(monkeypatch):
    monkeypatch.setenv("GAMMA_KERNEL", "torch")


def modules():
    """Expert number and part -> declared module; no two experts are alike."""
    made = {}
    for expert in range(EXPERTS):
        for i, part in enumerate(IDS):
            shape = (HIDDEN, INTERMEDIATE) if part == "down" else (INTERMEDIATE, HIDDEN)
            made[expert, part] = declare(*shape, *FORMS[(expert + 2 * i) % len(FORMS)])
    return made


def make_layer(declared, tp=(0, 1), local=range(EXPERTS), on_input=False):
    """A layer as vLLM makes it: tensor-parallel (rank, size), or with the experts `local` only."""
    layer = nn.Module()
    slots = {g: i for i, g in enumerate(local)}
    layer.layer_name = "a.experts"
    layer.activation = MoEActivation.SILU
    layer.apply_router_weight_on_input = on_input
    layer.swiglu_limit = layer.swiglu_alpha = layer.swiglu_beta = None
    layer.expert_map_manager = SimpleNamespace(map_global_to_local=lambda g: slots.get(g, -1))
    whole = len(slots) == EXPERTS
    layer.expert_map = None if whole else torch.tensor([slots.get(g, -1) for g in range(EXPERTS)], dtype=torch.int32)
    layer.moe_config = SimpleNamespace(
        has_bias=False, is_act_and_mul=True, tp_rank=tp[0], tp_size=tp[1],
        activation_situ_beta=None, activation_situ_linear_beta=None,
    )  # fmt: skip
    named = {key: CheckpointModule(f"a.experts.{key[0]}.{key[1]}_proj", form) for key, form in declared.items()}
    experts = [ExpertModules((named[i, "gate"], named[i, "up"]), named[i, "down"]) for i in range(EXPERTS)]
    layer.quant_method = GammaMoEMethod(layer, experts, "BF16")
    layer.quant_method.create_weights(layer, len(slots), HIDDEN, INTERMEDIATE // tp[1], torch.float32)
    return layer


def load(layer, declared, skip=()):
    """Hand every stored tensor to the weight loaders; returns the float32 weights."""
    weights = {}
    for seed, ((expert, part), form) in enumerate(declared.items()):
        tensors, weights[expert, part] = stored_tensors(form, seed)
        for name, tensor in tensors.items():
            if (expert, part, name) not in skip:
                parameter = getattr(layer, f"{'w2' if part == 'down' else 'w13'}_{name}")
                found = parameter.weight_loader(
                    parameter, tensor, weight_name="", shard_id=IDS[part], expert_id=expert, return_success=True
                )
                local = layer.expert_map_manager.map_global_to_local(expert) != -1
                assert found == local
    return weights


def expected(weights, x, shares, ids):
    result = torch.zeros_like(x)
    for token in range(len(x)):
        for share, expert in zip(shares[token], ids[token].tolist(), strict=True):
            hidden = F.silu(weights[expert, "gate"] @ x[token]) * (weights[expert, "up"] @ x[token])
            result[token] += share * (weights[expert, "down"] @ hidden)
    return result


@pytest.fixture
def routed():
    torch.manual_seed(0)
    x, shares = torch.randn(5, HIDDEN), torch.rand(5, TOP_K)
    return x, shares, torch.tensor([[0, 1], [1, 2], [2, 0], [1, 0], [0, 2]], dtype=torch.int32)  # nothing for 3


@pytest.mark.parametrize("kernel", ["torch", "auto"])
@pytest.mark.parametrize("ranks", ["one", "cut", "dealt out"])
def test_the_ranks_add_up_to_the_sum_over_experts(parallel, monkeypatch, routed, ranks, kernel):
    monkeypatch.setenv("GAMMA_KERNEL", kernel)
    declared = modules()
    make = {
        "one": [{}],
        "cut": [{"tp": (0, 2)}, {"tp": (1, 2)}],
        "dealt out": [{"local": (0, 2)}, {"local": (1, 3)}],
    }[ranks]
    total = torch.zeros(5, HIDDEN)
    for options in make:
        layer = make_layer(declared, **options)
        weights = load(layer, declared)
        layer.quant_method.process_weights_after_loading(layer)
        assert all(name.startswith("gamma_w") for name, _ in layer.named_parameters())
        total += layer.quant_method.apply(layer, *routed, None, None)
    torch.testing.assert_close(total, expected(weights, *routed), rtol=1e-3, atol=1e-3)


def test_a_captured_graph_does_not_look_where_the_tokens_go(parallel, routed):
    declared = modules()
    layer = make_layer(declared)
    load(layer, declared)
    layer.quant_method.process_weights_after_loading(layer)
    x, shares, ids = routed
    dynamic = layer.quant_method.multiply(layer, x, shares, ids)
    static = layer.quant_method.multiply_all(layer, x, shares, ids.long())
    torch.testing.assert_close(static, dynamic, rtol=1e-4, atol=1e-4)


def test_router_weights_can_go_on_the_input(parallel, routed):
    declared = modules()
    layer = make_layer(declared, on_input=True)
    weights = load(layer, declared)
    layer.quant_method.process_weights_after_loading(layer)
    x, shares, ids = routed[0], routed[1][:, :1], routed[2][:, :1]
    given = layer.quant_method.apply(layer, x, shares, ids, None, None)
    torch.testing.assert_close(given, expected(weights, x * shares, torch.ones(5, 1), ids), rtol=1e-3, atol=1e-3)


def test_a_tensor_that_never_came_is_named(parallel):
    declared = modules()
    layer = make_layer(declared)
    load(layer, declared, skip={(3, "down", "weight_scale")})
    with pytest.raises(ContractError, match=r"has no a\.experts\.3\.down_proj\.weight_scale;"):
        layer.quant_method.process_weights_after_loading(layer)


def test_an_expert_of_another_shape_is_refused(parallel):
    declared = modules() | {(2, "up"): declare(96, HIDDEN, 4)}
    with pytest.raises(ContractError, match=r"a\.experts\.2\.up_proj: .* \[96, 64\], the layer a\.experts has 128"):
        make_layer(declared)
