# ruff: noqa: E402 - torch and vllm are optional: imported only when they are there
"""Embeddings and lm_heads below 16 bits, for every rank of a padded vocabulary."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from allocator.contract.errors import ContractError
from allocator.contract.packing import dequantize, pack_codes, pack_zero_points
from gamma_vllm.embedding import TiedHeadMethod, gather_rows
from gamma_vllm.kernels.native import NativeKernel, usable_isas
from tests.gamma_vllm.layers import declare, gamma_config, load
from tests.gamma_vllm.test_native import needs_native

FORMATS = {"symmetric": (5, 32, True), "asymmetric, words straddled": (3, 64, False), "8 bits": (8, 64, False)}


@pytest.fixture(autouse=True)
def reference_kernel(monkeypatch):
    monkeypatch.setenv("GAMMA_KERNEL", "torch")


def process(layer):
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("kernel", ["torch", "auto"])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("size", [1, 2, 8])
def test_ranks_of_an_embedding_hold_their_rows_and_zeros_below(parallel, monkeypatch, size, form, kernel):
    monkeypatch.setenv("GAMMA_KERNEL", kernel)
    modules = {"model.embed_tokens": declare(150, 64, *form)}  # padded to 192
    for rank in range(size):
        parallel(rank, size)
        layer = VocabParallelEmbedding(150, 64, quant_config=gamma_config(modules), prefix="model.embed_tokens")
        whole = F.pad(load(layer, modules, {})["model.embed_tokens"], (0, 0, 0, 42))
        process(layer)
        expected = whole.chunk(size)[rank]
        ids = torch.arange(192 // size).view(2, -1)
        rows = layer.quant_method.embedding(layer, ids)
        torch.testing.assert_close(rows, expected.view(*ids.shape, 64), rtol=0, atol=0)
        assert rows.dtype == torch.get_default_dtype()


@pytest.mark.parametrize("kernel", ["torch", "auto"])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("size", [1, 2])
def test_ranks_of_an_lm_head_give_the_logits_of_their_rows(parallel, monkeypatch, size, form, kernel):
    monkeypatch.setenv("GAMMA_KERNEL", kernel)
    modules = {"lm_head": declare(150, 64, *form)}
    x = torch.randn(3, 64)
    for rank in range(size):
        parallel(rank, size)
        layer = ParallelLMHead(150, 64, quant_config=gamma_config(modules), prefix="lm_head")
        whole = F.pad(load(layer, modules, {})["lm_head"], (0, 0, 0, 42))
        process(layer)
        given = layer.quant_method.apply(layer, x)
        torch.testing.assert_close(given, x @ whole.chunk(size)[rank].T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_a_tied_head_multiplies_with_the_embedding(parallel, monkeypatch, kernel):
    monkeypatch.setenv("GAMMA_KERNEL", kernel)
    modules = {"model.embed_tokens": declare(128, 64, 4, 32, False)}
    config = gamma_config(modules)
    config.ties_embeddings = True
    embedding = VocabParallelEmbedding(128, 64, quant_config=config, prefix="")  # as Llama makes it
    head = ParallelLMHead(128, 64, quant_config=config, prefix="lm_head")
    assert isinstance(head.quant_method, TiedHeadMethod)
    assert not list(head.parameters())
    head = head.tie_weights(embedding)
    weight = load(embedding, modules, {})["model.embed_tokens"]
    process(head)
    process(embedding)
    x = torch.randn(3, 64)
    torch.testing.assert_close(head.quant_method.apply(head, x), x @ weight.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(embedding(torch.tensor([5, 127])), weight[[5, 127]], rtol=0, atol=0)
    if kernel == "torch":  # one copy for both
        held = sum(p.numel() * p.element_size() for p in embedding.parameters())
        assert held == 128 * 64 // 2 + 128 * 2 * 2 + 16 * 2 * 4


def test_only_an_embedding_gathers_and_only_an_lm_head_multiplies(parallel):
    modules = {"model.embed_tokens": declare(128, 64, 4), "lm_head": declare(128, 64, 4)}
    config = gamma_config(modules)
    embedding = VocabParallelEmbedding(128, 64, quant_config=config, prefix="model.embed_tokens")
    head = ParallelLMHead(128, 64, quant_config=config, prefix="lm_head")
    load(embedding, {"model.embed_tokens": modules["model.embed_tokens"]}, {})
    load(head, {"lm_head": modules["lm_head"]}, {})
    names = [{n for n, _ in process(layer).named_parameters()} for layer in (embedding, head)]
    assert names[0] == {"weight_packed", "gamma_rows_packed", "gamma_rows_scale"}
    assert names[1] == {"weight_packed", "gamma_0_packed", "gamma_0_scale"}


def test_a_vocabulary_of_another_size_is_refused(parallel):
    config = gamma_config({"lm_head": declare(128, 64, 4)})
    with pytest.raises(ContractError, match=r"lm_head: .* shape \[128, 64\], the model has a vocabulary of 192"):
        ParallelLMHead(192, 64, quant_config=config, prefix="lm_head")


def test_added_tokens_are_refused(parallel):
    config = gamma_config({"lm_head": declare(128, 64, 4)})
    with pytest.raises(ContractError, match="lm_head: the model adds 8 tokens"):
        ParallelLMHead(136, 64, org_num_embeddings=128, quant_config=config, prefix="lm_head")


def _vocabulary(num_bits: int, rows: int, columns: int, symmetric: bool, data: st.DataObject):
    """Codes, scales and zero points of a module in groups of 32, and some of its rows to gather."""
    generator = torch.Generator().manual_seed(rows)
    packed = pack_codes(torch.randint(0, 1 << num_bits, (rows, columns), generator=generator), num_bits)
    scale = torch.rand(rows, columns // 32, generator=generator).to(torch.bfloat16)
    zeros = torch.randint(0, 1 << num_bits, (rows, columns // 32), generator=generator)
    zero_point = None if symmetric else pack_zero_points(zeros, num_bits)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), max_size=8)), dtype=torch.int64)
    return packed, scale, zero_point, ids


@settings(deadline=None)
@given(st.sampled_from([2, 3, 4, 5, 6, 8]), st.integers(1, 90), st.booleans(), st.data())
def test_gathered_rows_are_those_of_the_whole(num_bits, rows, symmetric, data):
    packed, scale, zero_point, ids = _vocabulary(num_bits, rows, 64, symmetric, data)
    given_rows = gather_rows(ids, packed, scale, zero_point, num_bits, torch.float32)
    assert torch.equal(given_rows, dequantize(packed, scale, zero_point, num_bits)[ids])


@needs_native
@settings(deadline=None)
@given(st.sampled_from([2, 3, 4, 5, 6, 8]), st.integers(1, 90), st.booleans(), st.data())
def test_the_native_kernel_gathers_the_same_rows(num_bits, rows, symmetric, data):
    # In groups of 32: of three, and of more than the sixteen whose scales are read together.
    packed, scale, zero_point, ids = _vocabulary(
        num_bits, rows, data.draw(st.sampled_from([96, 2080])), symmetric, data
    )
    kernel = NativeKernel(data.draw(st.sampled_from(usable_isas())))
    gathered = kernel.gather_rows(ids.view(1, -1), packed, scale, zero_point, num_bits)
    assert torch.equal(gathered[0], gather_rows(ids, packed, scale, zero_point, num_bits, torch.bfloat16))
    with pytest.raises(RuntimeError, match=f"row {rows} of an embedding of {rows} rows"):
        kernel.gather_rows(torch.tensor([rows]), packed, scale, zero_point, num_bits)
