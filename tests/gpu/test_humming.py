# ruff: noqa: E402 - torch and vllm are optional: imported only when they are there
"""humming on a real GPU, against dequantized weights: `make test-gpu`."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from gamma_vllm.kernels.choose import choose_kernel
from gamma_vllm.kernels.humming import HummingKernel
from gamma_vllm.shards import Segment
from tests.gamma_vllm import test_moe
from tests.gamma_vllm.conftest import parallel
from tests.gamma_vllm.layers import declare
from tests.gamma_vllm.test_kernels import make_segment, planned_bytes, relative_error
from tests.skips import lacking

__all__ = ["parallel"]
pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(1800)]

CUDA = torch.device("cuda", 0)
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
EVERY_WIDTH = [((1024, 1024, 128), num_bits, BFLOAT16) for num_bits in (2, 3, 4, 5, 6, 8)]
# A fraction of a tile, rows that are filled up, small groups; and the other dtype.
OTHERS = [((256, 512, 64), 3, BFLOAT16), ((40, 384, 32), 5, BFLOAT16), ((256, 512, 64), 3, FLOAT16)]
TOKENS = (1, 2, 16, 65, 300, 1100)


def kernel_for(dtype, monkeypatch):
    """The kernel as vLLM chooses it for a model of this dtype."""
    monkeypatch.setattr(torch, "get_default_dtype", lambda: dtype)
    reason = HummingKernel.why_not(CUDA)
    if reason is not None:
        pytest.skip(lacking("device", reason))
    return HummingKernel(dtype)


@pytest.fixture
def kernel(monkeypatch):
    return kernel_for(BFLOAT16, monkeypatch)


def on_gpu(tensors):
    return {name: tensor.to(CUDA) for name, tensor in tensors.items()}


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("shape", "num_bits", "dtype"), EVERY_WIDTH + OTHERS)
def test_products_are_those_of_the_dequantized_weight(shape, num_bits, dtype, symmetric, monkeypatch):
    kernel, (rows, columns, group_size) = kernel_for(dtype, monkeypatch), shape
    segment, tensors, weight = make_segment(rows, columns, num_bits, group_size, symmetric)
    packed = kernel.pack(segment, on_gpu(tensors))
    held = sum(tensor.nbytes for name, tensor in packed.items() if name != "locks")
    assert held == planned_bytes(segment, "humming")
    for tokens in TOKENS:
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(CUDA, dtype)
        given = kernel.linear(segment, packed, x)
        assert given.dtype == dtype
        assert relative_error(given, x.float() @ weight.to(CUDA).T) < 1e-2, tokens
        assert not packed["locks"].any()  # as they were: the next call begins with zeros


def test_a_layer_of_several_widths_and_a_dense_part(kernel):
    kinds = [(256, 512, 3, 64, True), (128, 512, 5, 32, False), (40, 512, 2, 64, False)]
    parts = [make_segment(*kind) for kind in kinds]
    segments = [segment for segment, _, _ in parts] + [Segment((9,), 16, None, None, 64, 512)]
    dense = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).to(CUDA, kernel.dtype)
    held = [kernel.pack(segment, on_gpu(tensors)) for segment, tensors, _ in parts] + [{"weight": dense}]
    whole = torch.cat([*(weight.to(CUDA) for _, _, weight in parts), dense.float()])
    for tokens in TOKENS:
        x = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(tokens)).to(CUDA, kernel.dtype)
        assert relative_error(kernel.layer(segments, held, x), x.float() @ whole.T) < 1e-2


def test_products_side_by_side_are_those_in_turn(kernel, monkeypatch):
    """The products of a layer on streams of their own, as they are captured too."""
    parts = [make_segment(rows, 512, bits, 64, False) for rows, bits in ((2048, 3), (512, 4), (512, 5))]
    segments = [segment for segment, _, _ in parts]
    held = [kernel.pack(segment, on_gpu(tensors)) for segment, tensors, _ in parts]
    x = torch.randn(4, 512, device=CUDA, dtype=kernel.dtype)
    expected = kernel.layer(segments, held, x)
    monkeypatch.setenv("GAMMA_HUMMING_SEGMENTS", "side-by-side")
    assert torch.equal(kernel.layer(segments, held, x), expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = kernel.layer(segments, held, x)
    x.neg_()
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(output, -expected)


def test_a_captured_graph_gives_the_same_products(kernel):
    segment, tensors, _ = make_segment(1024, 1024, 3, 128, False)
    packed = kernel.pack(segment, on_gpu(tensors))
    x = torch.randn(4, 1024, device=CUDA, dtype=kernel.dtype)
    expected = kernel.linear(segment, packed, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = kernel.linear(segment, packed, x)
    for scale in (1.0, -2.0):
        x.mul_(scale)
        expected = kernel.linear(segment, packed, x)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, expected)


@pytest.mark.parametrize("way", ["alone", "together"])
def test_experts(kernel, parallel, monkeypatch, way):
    """Alone: a launch for each expert's part. Together: one for all of a width, in a captured graph too."""
    monkeypatch.setenv("GAMMA_HUMMING_EXPERTS", way)
    kinds = [(3, 32, True), (5, 64, False), (3, 32, True), (4, 32, False)]
    declared = {
        (expert, part): declare(*form.shape, *kinds[(expert + (part == "up" and expert == 2)) % 4])
        for (expert, part), form in test_moe.modules().items()
    }
    with CUDA:
        layer = test_moe.make_layer(declared, dtype=BFLOAT16)
    weights = test_moe.load(layer, declared)
    layer.quant_method.process_weights_after_loading(layer)
    assert all(stack.index is None for stack in layer.quant_method.stacks) == (way == "alone")
    for tokens in (1, 5, 200):
        x, shares, ids = test_moe.route(tokens)
        exact = test_moe.expected(weights, x.float(), shares, ids)
        on_card = [tensor.to(CUDA) for tensor in (x, shares, ids)]
        given = layer.quant_method.multiply(layer, *on_card)
        assert relative_error(given, exact.to(CUDA)) < 1e-2
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = layer.quant_method.multiply(layer, *on_card)
        on_card[2].copy_(ids.flip(1))
        on_card[1].copy_(shares.flip(1))
        graph.replay()
        torch.cuda.synchronize()
        assert relative_error(output, exact.to(CUDA)) < 1e-2


def test_vllm_prefers_it(kernel):
    assert choose_kernel(CUDA).name == "humming"
