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
from gamma_vllm.kernels.base import Activation, Place, Stack
from gamma_vllm.kernels.native import NativeKernel, usable_isas
from gamma_vllm.moe import ExpertModules, GammaMoEMethod
from gamma_vllm.shards import CheckpointModule, Segment
from gamma_vllm.weight_stream import ExpertPlace, load_experts
from tests.gamma_vllm.layers import declare, stored_tensors
from tests.skips import lacking_kernel

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


def make_layer(declared, tp=(0, 1), local=range(EXPERTS), on_input=False, dtype=torch.float32, biased=False):
    """A layer as vLLM makes it: tensor-parallel (rank, size), or with the experts `local` only."""
    layer = nn.Module()
    slots = {g: i for i, g in enumerate(local)}
    layer.layer_name = "a.experts"
    layer.activation = MoEActivation.SWIGLUOAI if biased else MoEActivation.SILU
    layer.apply_router_weight_on_input = on_input
    layer.swiglu_limit = layer.swiglu_alpha = layer.swiglu_beta = None
    layer.expert_map_manager = SimpleNamespace(map_global_to_local=lambda g: slots.get(g, -1))
    whole = len(slots) == EXPERTS
    layer.expert_map = None if whole else torch.tensor([slots.get(g, -1) for g in range(EXPERTS)], dtype=torch.int32)
    layer.moe_config = SimpleNamespace(
        has_bias=biased, is_act_and_mul=True, tp_rank=tp[0], tp_size=tp[1],
        activation_situ_beta=None, activation_situ_linear_beta=None,
    )  # fmt: skip
    named = {key: CheckpointModule(f"a.experts.{key[0]}.{key[1]}_proj", form) for key, form in declared.items()}
    parts = ("gate_up",) if biased else ("gate", "up")
    experts = [ExpertModules(tuple(named[i, part] for part in parts), named[i, "down"]) for i in range(EXPERTS)]
    layer.quant_method = GammaMoEMethod(layer, experts, "BF16")
    layer.quant_method.create_weights(layer, len(slots), HIDDEN, INTERMEDIATE // tp[1], dtype)
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


def _gpt_oss(weights, biases, x):
    """One expert of gpt-oss on one token, as transformers computes it: gate and up in turns, limited, and biases."""
    hidden = weights["gate_up"] @ x + biases["w13"]
    gate, up = hidden[::2].clamp(max=7), hidden[1::2].clamp(-7, 7)
    return weights["down"] @ ((up + 1) * gate * torch.sigmoid(1.702 * gate)) + biases["w2"]


@pytest.mark.parametrize("ranks", ["one", "cut", "dealt out"])
def test_experts_with_biases_and_their_gate_and_up_in_turns(parallel, routed, ranks):
    declared, weights, biases = {}, {}, {}
    for expert in range(EXPERTS):
        declared[expert, "gate_up"] = declare(2 * INTERMEDIATE, HIDDEN, *FORMS[expert])
        declared[expert, "down"] = declare(HIDDEN, INTERMEDIATE, *FORMS[expert + 3])
        generator = torch.Generator().manual_seed(expert)
        biases[expert] = {
            "w13": 4 * torch.randn(2 * INTERMEDIATE, generator=generator),
            "w2": torch.randn(HIDDEN, generator=generator),
        }
    x, shares, ids = routed
    total = torch.zeros(5, HIDDEN)
    make = {
        "one": [{}],
        "cut": [{"tp": (0, 2)}, {"tp": (1, 2)}],
        "dealt out": [{"local": (0, 2)}, {"local": (1, 3)}],
    }[ranks]
    for options in make:
        layer = make_layer(declared, biased=True, **options)
        places = {}
        for (expert, part), form in declared.items():
            name = f"a.experts.{expert}.{part}_proj"
            tensors, weights[expert, part] = stored_tensors(form, expert)
            places[name] = ExpertPlace(layer, *(("w2", "w2") if part == "down" else ("w13", "w1")), expert)
            stream = [(f"{name}.{leaf}", tensor) for leaf, tensor in tensors.items()]
            assert list(load_experts(places, [*stream, ("a.router.weight", x)])) == [("a.router.weight", x)]
        rank, size = options.get("tp", (0, 1))
        wide = 2 * INTERMEDIATE // size
        for slot, expert in enumerate(options.get("local", range(EXPERTS))):
            layer.w13_bias.data[slot] = biases[expert]["w13"][rank * wide : (rank + 1) * wide]
            layer.w2_bias.data[slot] = biases[expert]["w2"] if rank == 0 else 0  # as vLLM loads them
        layer.quant_method.process_weights_after_loading(layer)
        total += layer.quant_method.apply(layer, *routed, None, None)
    exact = torch.zeros_like(x)
    for token in range(len(x)):
        for share, expert in zip(shares[token], ids[token].tolist(), strict=True):
            of_expert = {part: weights[expert, part] for part in ("gate_up", "down")}
            exact[token] += share * _gpt_oss(of_expert, biases[expert], x[token])
    torch.testing.assert_close(total, exact, rtol=1e-3, atol=1e-3)


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


@pytest.fixture(params=["avx512", "avx2"])
def native_kernel(request, monkeypatch):
    """The kernel of each instruction set that this CPU has, chosen for all layers."""
    if request.param not in usable_isas():
        reason = NativeKernel.why_not(torch.device("cpu"))
        pytest.skip(lacking_kernel(reason or f"this CPU has not all of {request.param}"))
    monkeypatch.setattr("gamma_vllm.moe.choose_kernel", lambda device: NativeKernel(request.param))
    return NativeKernel(request.param)


def ready_layer(declared=None, **options):
    """A loaded layer in bfloat16, and the float32 weights."""
    declared = declared or modules()
    layer = make_layer(declared, dtype=torch.bfloat16, **options)
    weights = load(layer, declared)
    layer.quant_method.process_weights_after_loading(layer)
    return layer, weights


def route(tokens):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(torch.bfloat16)
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :TOP_K].to(torch.int32)
    return x, torch.rand(tokens, TOP_K, generator=generator), ids


def one_by_one(layer, *routed):
    """What the layer gives when its kernel does not multiply all experts at once."""
    kept = [stack.index for stack in layer.quant_method.stacks]
    for stack in layer.quant_method.stacks:
        stack.index = None
    result = layer.quant_method.multiply(layer, *routed)
    for stack, index in zip(layer.quant_method.stacks, kept, strict=True):
        assert index is not None  # they were multiplied at once before
        stack.index = index
    return result


TOKENS = (1, 5, 40, 200)  # few and many for each expert


def test_all_experts_at_once_give_the_sum_over_experts(parallel, native_kernel):
    dense = {key: declare(*form.shape, 16) if key[0] in (0, 3) else form for key, form in modules().items()}
    for declared in (modules(), dense):
        layer, weights = ready_layer(declared)
        for tokens in TOKENS:
            x, shares, ids = route(tokens)
            exact = expected(weights, x.float(), shares, ids)
            for result in (layer.quant_method.multiply(layer, x, shares, ids), one_by_one(layer, x, shares, ids)):
                assert (result.float() - exact).norm() < 1e-2 * exact.norm(), tokens


@pytest.mark.parametrize("local", [range(EXPERTS), (1, 3)], ids=["all experts", "those of a rank"])
def test_all_experts_at_once_are_each_alone_to_the_last_bit(parallel, native_kernel, local):
    """With an activation of vLLM's, and shares whose products are exact: other than these, nothing is computed anew."""
    layer, _ = ready_layer(local=local)
    layer.activation = MoEActivation.GELU
    for tokens in TOKENS:
        x, shares, ids = route(tokens)
        shares = torch.exp2(-torch.ceil(4 * shares))
        ids[0] = torch.tensor([0, 2])  # of no expert of the second rank
        together = layer.quant_method.multiply(layer, x, shares, ids)
        assert torch.equal(together, one_by_one(layer, x, shares, ids)), tokens


def test_how_many_threads_multiply_experts_is_not_seen(parallel, native_kernel):
    layer, _ = ready_layer()
    before = torch.get_num_threads()
    try:
        for tokens in TOKENS:
            results = []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(layer.quant_method.multiply(layer, *route(tokens)))
            assert torch.equal(*results), tokens
    finally:
        torch.set_num_threads(before)


def test_what_is_of_another_layer_is_refused(parallel, native_kernel):
    layer, _ = ready_layer()
    x, shares, ids = route(2)
    ids[1, 0] = EXPERTS
    with pytest.raises(RuntimeError, match="expert 4 of 4"):
        layer.quant_method.multiply(layer, x, shares, ids)
    with pytest.raises(ValueError, match="32 activations for a weight of 64 columns"):
        layer.quant_method.multiply(layer, x[:, :32], shares, ids)


def test_gates_of_all_sizes(native_kernel):
    """The kernel's own silu(gate) * up: an expert whose w2 is the identity gives it back."""
    segment = Segment((0,), 16, None, None, 64, 64)
    eye = {"weight": torch.eye(64, dtype=torch.bfloat16).flatten()}
    w2 = Stack([[segment]], eye, {(0, 0, "weight"): Place(0, (64, 64))})
    w13 = Stack([[Segment((0, 1), 16, None, None, 128, 64)]], {"weight": eye["weight"].repeat(2)}, {
        (0, 0, "weight"): Place(0, (128, 64)),
    })  # fmt: skip
    silu = Activation(lambda hidden: hidden, silu=True)
    stacks = [Stack(s.segments, s.tensors, s.places, native_kernel.index_experts(s)) for s in (w13, w2)]
    for largest in (1e-3, 1.0, 20.0, 100.0, 1e4):
        x = torch.linspace(-largest, largest, 10 * 64).view(10, 64).to(torch.bfloat16)
        ids = torch.zeros(10, 1, dtype=torch.int64)
        given = native_kernel.experts(*stacks, x, ids, torch.ones(10, 1), silu)
        torch.testing.assert_close(given.float(), F.silu(x.float()) * x.float(), rtol=4e-3, atol=1e-30)
    x[3, 7] = torch.nan
    assert native_kernel.experts(*stacks, x, ids, torch.ones(10, 1), silu).isnan().any(1).tolist() == [
        token == 3 for token in range(10)
    ]
