# ruff: noqa: E402 - torch and vllm are optional: imported only when they are there
"""Layers whose modules are cut into channel blocks: what they compute, for every rank, and how they are loaded."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

from allocator.contract.channel_blocks import ChannelBlocks
from allocator.contract.errors import ContractError
from gamma_vllm import pieces as gamma_pieces
from tests.gamma_vllm.layers import declare, gamma_config, load, stored_tensors

WIDTH, HIDDEN, LAYOUT = 32, 64, ChannelBlocks(blocks=3, chunks=4)
GATE = [(8, 32, True), (4, 64, False), (2, 32, False)]
UP = [(8, 32, True), (16,), (3, 32, False)]  # piece 0 is one product
NAMES = [f"a.mlp.{name}_proj.rows.{number}" for name in ("gate", "up") for number in range(3)]


@pytest.fixture(autouse=True)
def reference_kernel(monkeypatch):
    monkeypatch.setenv("GAMMA_KERNEL", "torch")


def declared(kinds=(*GATE, *UP)):
    modules = {name: declare(WIDTH, HIDDEN, *kind) for name, kind in zip(NAMES, kinds, strict=True)}
    return modules | {"a.mlp.down_proj": declare(HIDDEN, 3 * WIDTH, 16)}


def make_layer(modules, layout=LAYOUT):
    config = gamma_config(modules, layout)
    sizes = [3 * WIDTH] * 2
    return MergedColumnParallelLinear(HIDDEN, sizes, bias=False, quant_config=config, prefix="a.mlp.gate_up_proj")


def load_pieces(layer, modules):
    """Give all pieces to the layer as vLLM does; returns the weights of gate and up, rows as the layout has them."""
    weights = {}
    for seed, name in enumerate(NAMES):
        tensors, weights[name] = stored_tensors(modules[name], seed)
        for part, tensor in tensors.items():
            tensor.shard_id = int("up_proj" in name)
            list(layer.load_weights([(f"rows.{name[-1]}.{part}", tensor)]))
    whole = torch.empty(2, 3 * WIDTH, HIDDEN)
    for name, weight in weights.items():
        whole[int("up_proj" in name), LAYOUT.rows_of(int(name[-1]), WIDTH).numbers()] = weight
    return whole


def process(layer):
    for module in (layer, *layer.rows):  # as vLLM does with every module that has a quant_method
        module.quant_method.process_weights_after_loading(module)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kinds", [(*GATE, *UP), ((16,),) * 6], ids=["mixed", "16 bits"])
def test_every_rank_has_the_channels_of_its_columns_of_down_proj(parallel, size, kinds):
    modules = declared(kinds)
    x = torch.randn(3, HIDDEN)
    total, expected = torch.zeros(3, HIDDEN), None
    for rank in range(size):
        parallel(rank, size)
        layer = make_layer(modules)
        gate, up = load_pieces(layer, modules)
        process(layer)
        output, _ = layer(x)
        ranks = [part.chunk(size)[rank] for part in (gate, up)]
        torch.testing.assert_close(output, torch.cat([x @ part.T for part in ranks], -1), rtol=1e-5, atol=1e-5)
        down = RowParallelLinear(
            3 * WIDTH, HIDDEN, bias=False, quant_config=gamma_config(modules, LAYOUT), prefix="a.mlp.down_proj",
            reduce_results=False,
        )  # fmt: skip
        weight = load(down, {"a.mlp.down_proj": modules["a.mlp.down_proj"]}, {})["a.mlp.down_proj"]
        down.quant_method.process_weights_after_loading(down)
        h = [part.float() for part in output.chunk(2, -1)]
        total += down(torch.relu(h[0]) * h[1])[0]
        expected = (torch.relu(x @ gate.T) * (x @ up.T)) @ weight.T
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-3)


def test_equal_neighbours_inside_a_piece_are_one_product(parallel):
    layer = make_layer(declared())
    assert [len(piece.quant_method.segments) for piece in layer.rows] == [1, 2, 2]


def test_a_piece_that_was_not_loaded_is_named(parallel):
    modules = declared()
    layer = make_layer(modules)
    tensors, _ = stored_tensors(modules[NAMES[0]], 0)
    for part, tensor in tensors.items():
        tensor.shard_id = 0
        list(layer.load_weights([(f"rows.0.{part}", tensor)]))
    with pytest.raises(ContractError, match=r"the checkpoint has no a\.mlp\.up_proj\.rows\.0\.weight_packed"):
        process(layer)


def test_more_ranks_than_chunks_are_refused(parallel):
    parallel(0, 8)
    with pytest.raises(ContractError, match=r"laid out in 4 chunks, which tensor_parallel_size 8 .* \[1, 2, 4\]"):
        make_layer(declared())


def test_adapters_are_refused(parallel, monkeypatch):
    config = SimpleNamespace(lora_config=object())
    monkeypatch.setattr(gamma_pieces, "get_current_vllm_config_or_none", lambda: config)
    with pytest.raises(ContractError, match="adapters are for their original order; serve without --enable-lora"):
        make_layer(declared())
