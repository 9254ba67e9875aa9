# ruff: noqa: E402 - torch, vllm and humming are optional: imported only when they are there
"""What the humming adapter hands over, against humming's own schemas and signatures: no GPU is needed.

Only the reordering of codes, which humming does on the GPU, is replaced by one that gives tensors of the same shape.
"""

import contextlib
import inspect
import json
import math
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from allocator.contract.packing import dequantize, unpack_zero_points
from gamma_vllm.kernels import humming as adapter
from gamma_vllm.kernels import humming_experts
from gamma_vllm.kernels.choose import choose_kernel
from gamma_vllm.kernels.humming import HummingKernel
from tests.gamma_vllm.test_kernels import make_segment, planned_bytes, relative_error
from tests.skips import lacking

CUDA = torch.device("cuda")
SHAPES = [(256, 128, 128), (1024, 384, 64), (128, 96, 32), (40, 256, 128)]  # rows, columns, group size


def has_humming():
    try:
        import humming.transform  # noqa: F401
    except ImportError:
        return False
    return True


needs_humming = pytest.mark.skipif(not has_humming(), reason=lacking("device", "humming-kernels are not here"))


@pytest.fixture
def device(monkeypatch):
    """A GPU of compute capability 9.0 as far as humming asks for one; tensors stay on the CPU."""
    from humming import transform
    from humming.device import current_device

    def repack(inputs, weight_bits, activation_bits, is_weight_packed, **_rest):
        assert is_weight_packed
        pack_size = 256 // activation_bits
        rows, columns = inputs.shape[-2], inputs.shape[-1] * 32 // weight_bits
        assert rows % 64 == 0
        assert columns % (2 * pack_size) == 0
        return inputs.reshape(1, columns // pack_size, rows * pack_size * weight_bits // 32)

    def unpack(inputs, num_bits):
        from allocator.contract.packing import unpack_codes

        return unpack_codes(inputs, num_bits).to(torch.int32)

    gpu = SimpleNamespace(name="H100", index=0, sm_version=90, sm_major=9, is_ppu=False, sm_count=132)
    monkeypatch.setattr(transform, "DeviceInfo", lambda device=None: gpu)
    monkeypatch.setattr(current_device, "_value", gpu)
    monkeypatch.setattr(transform.ops, "repack_weight", repack)
    monkeypatch.setattr(transform.ops, "unpack_weight", unpack)
    monkeypatch.setattr(adapter, "locks_of", lambda device: torch.zeros(132 * 8, dtype=torch.int32))
    adapter.layer_config.cache_clear()
    yield
    adapter.layer_config.cache_clear()


@needs_humming
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 5, 6, 8])
def test_our_tensors_are_those_of_their_schema(num_bits, symmetric, dtype):
    for rows, columns, group_size in SHAPES:
        segment, tensors, _ = make_segment(rows, columns, num_bits, group_size, symmetric)
        given, given_rows = adapter.standard_tensors(segment, tensors, dtype)
        schema, inputs = adapter.schema_of(segment)
        schema.validate_tensors(given, given_rows, columns, dtype)
        assert inputs.a_dtype is None
        assert schema.has_zero_point != symmetric
        assert given_rows - rows < (1 if symmetric else 32)
        if not symmetric:
            zeros = unpack_zero_points(given["zero_point"], num_bits, given_rows)
            assert torch.equal(zeros[:rows], unpack_zero_points(tensors["zero_point"], num_bits, rows))


@needs_humming
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 5, 6, 8])
def test_bytes_after_packing_are_known_ahead(device, num_bits, symmetric):
    kernel = HummingKernel(torch.bfloat16)
    for rows, columns, group_size in SHAPES:
        segment, tensors, _ = make_segment(rows, columns, num_bits, group_size, symmetric)
        packed = kernel.pack(segment, tensors)
        assert set(packed) == set(kernel.tensor_names(segment))
        held = sum(tensor.nbytes for name, tensor in packed.items() if name != "locks")
        assert held == planned_bytes(segment, "humming")


@needs_humming
def test_the_call_fits_their_signature_and_one_token_is_not_copied(device, monkeypatch):
    from humming import ops

    signature, calls = inspect.signature(ops.launch_kernel), []
    weights, rows_of = {}, {}

    def multiply(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        calls.append(given)
        product = given["inputs"].float() @ weights[given["weight"].data_ptr()].T
        rows = rows_of[int(given["configs"])]
        product = torch.nn.functional.pad(product, (0, rows - product.shape[1])).to(given["inputs"].dtype)
        if given.get("outputs") is None:
            return product
        assert given["outputs"].is_contiguous()
        return given["outputs"].copy_(product)

    def prepared(rows, columns, group_size, num_bits, asymmetric, dtype, device):
        config = adapter.layer_config(rows, columns, group_size, num_bits, asymmetric, dtype, device)
        rows_of[rows] = config.shape_n - config.pad_shape_n
        return torch.tensor(rows)

    monkeypatch.setattr(ops, "launch_kernel", multiply)
    monkeypatch.setattr(adapter, "kernels_of", prepared)
    adapter.products_of.cache_clear()
    kernel = HummingKernel(torch.bfloat16)
    parts = [
        make_segment(256, 128, 3, 64, True),
        make_segment(64, 128, 5, 32, False),
        make_segment(40, 128, 2, 64, False),
    ]
    held, expected = [], []
    for segment, tensors, weight in parts:
        held.append(kernel.pack(segment, tensors))
        weights[held[-1]["packed"].data_ptr()] = weight
        expected.append(weight)
    dense = torch.randn(24, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    segments = [segment for segment, _, _ in parts] + [adapter.Segment((9,), 16, None, None, 24, 128)]
    held.append({"weight": dense})
    whole = torch.cat([*expected, dense.float()])
    for tokens in (1, 3):
        x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(tokens)).to(torch.bfloat16)
        calls.clear()
        assert relative_error(kernel.layer(segments, held, x), x.float() @ whole.T) < 1e-2
        # Straight to its place for one token, if the rows were not filled up for the zero points (40 to 64).
        assert [c.get("outputs") is not None for c in calls] == [tokens == 1, tokens == 1, False]
        assert [rows_of[int(c["configs"])] for c in calls] == [256, 64, 64]
        assert all(math.prod(c["locks"].shape) == 132 * 8 for c in calls)
    assert kernel.layer(segments, held, torch.zeros(2, 0, 128, dtype=torch.bfloat16)).shape == (2, 0, len(whole))

    # Side by side: a stream for each product but one, forked from the first before that is launched, and all joined.
    events = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    main, side = Stream("main"), [Stream(f"side {i}") for i in range(3)]
    monkeypatch.setenv("GAMMA_HUMMING_SEGMENTS", "side-by-side")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(events.append(stream.name)))
    monkeypatch.setattr(adapter, "side_streams", lambda _device, count: side[:count])
    assert relative_error(kernel.layer(segments, held, x), x.float() @ whole.T) < 1e-2
    assert events == [
        *(text for i in range(3) for text in (f"side {i} waits for main", f"side {i}")),
        *(f"main waits for side {i}" for i in range(3)),
    ]
    x = torch.randn(100, 128).to(torch.bfloat16)
    events.clear()
    assert relative_error(kernel.layer(segments, held, x), x.float() @ whole.T) < 1e-2
    assert not events  # many tokens fill the GPU one product after the other


@needs_humming
@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("rows", [40, 1024, 6144])
def test_few_kernels_are_asked_for_and_every_number_of_tokens_has_one(device, monkeypatch, rows, asymmetric):
    from humming import device as devices

    monkeypatch.setattr(devices.DeviceInfo, "_instances", {0: devices.current_device})
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    config = adapter.layer_config(rows, 4096, 128, 3, asymmetric, torch.bfloat16, torch.device("cuda", 0))
    intervals = json.loads(adapter.tuning_config(config, torch.device("cuda", 0)))
    lows, highs, kinds = zip(*intervals, strict=True)
    assert lows == (0, *highs[:-1])
    assert highs[-1] >= 1 << 20
    assert len({json.dumps(kind, sort_keys=True) for kind in kinds}) <= 10
    # No tile is much larger than the fewest tokens that it is for.
    assert all(kind["block_shape"][0] <= max(8, 2 * low) for kind, low in zip(kinds, lows, strict=True))


@needs_humming
def test_they_say_that_they_can_multiply_all_our_widths(monkeypatch):
    from humming.schema import humming as schemas

    for capability, dtypes in ((75, [torch.float16]), (80, [torch.float16, torch.bfloat16])):
        monkeypatch.setattr(schemas, "current_device", SimpleNamespace(sm_version=capability, is_ppu=False))
        for dtype in dtypes:
            for num_bits in (2, 3, 4, 5, 6, 8):
                for symmetric in (True, False):
                    segment, _, _ = make_segment(256, 128, num_bits, 32, symmetric)
                    schema, inputs = adapter.schema_of(segment)
                    assert schemas.is_humming_schema_compatible(inputs, schema, dtype), (capability, dtype, num_bits)


def test_it_is_preferred_on_a_gpu_that_can_and_says_why_it_cannot_elsewhere(monkeypatch):
    assert "NVIDIA" in HummingKernel.why_not(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    assert "compute capability (8, 0), a GPU has (7, 5)" in HummingKernel.why_not(CUDA)
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float32)
    assert "torch.float32" in HummingKernel.why_not(CUDA)
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float16)
    reason = HummingKernel.why_not(CUDA)
    assert choose_kernel(CUDA).name == ("humming" if reason is None else "torch")
    assert reason is None or "humming-kernels cannot be imported" in reason


def blocks_by_expert(ids, block_size, num_experts, expert_map, ignore_invalid_experts):
    """What vLLM's operator does on a GPU: the pairs of each expert on the map, filled up to whole blocks."""
    assert ignore_invalid_experts
    assert len(expert_map) == num_experts
    sorted_ids, expert_ids = [], []
    for number in range(int(expert_map.max()) + 1):
        pairs = (expert_map[ids.flatten().long()] == number).nonzero().flatten().tolist()
        for first in range(0, len(pairs), block_size):
            block = pairs[first : first + block_size]
            sorted_ids += block + [ids.numel()] * (block_size - len(block))
            expert_ids.append(number)
    padded = torch.tensor([len(sorted_ids)])
    return torch.tensor(sorted_ids, dtype=torch.int64), torch.tensor(expert_ids, dtype=torch.int64), padded


@needs_humming
@pytest.mark.parametrize("local", [range(4), (1, 3)], ids=["all experts", "those of a rank"])
def test_experts_of_a_width_are_one_launch(device, monkeypatch, parallel, local):
    """Each launch, computed here, gets the experts of its width, and their sums are those over all experts."""
    from vllm.model_executor.layers.fused_moe import moe_align_block_size as vllm_blocks

    from tests.gamma_vllm import test_moe

    kinds = [(3, 32, True), (5, 64, False), (3, 32, True), (3, 32, False)]
    declared = {
        (expert, part): test_moe.declare(*(form.shape), *kinds[(expert + (part == "up" and expert == 2)) % 4])
        for (expert, part), form in test_moe.modules().items()
    }
    monkeypatch.setenv("GAMMA_HUMMING_EXPERTS", "together")
    monkeypatch.setattr("gamma_vllm.moe.choose_kernel", lambda _device: HummingKernel(torch.bfloat16))
    weights_of, launches, pack = {}, [], HummingKernel.pack

    def packed(kernel, segment, tensors):
        held = pack(kernel, segment, tensors)
        zeros = tensors.get("zero_point")
        key = tuple(held["packed"].flatten().tolist())
        weights_of[key] = dequantize(tensors["packed"], tensors["scale"], zeros, segment.num_bits)
        return held

    def multiply(kernels, x, held, routed, choices, output):
        launches.append(held["packed"].shape[0])
        sorted_ids, expert_ids, padded = routed
        assert int(padded) == len(sorted_ids)
        for block, expert in zip(sorted_ids.view(-1, 4), expert_ids.tolist(), strict=True):
            pairs = block[block < output.shape[0]]
            weight = weights_of[tuple(held["packed"][expert].flatten().tolist())]
            output[pairs] = (x[pairs // choices].float() @ weight.T).to(output.dtype)

    monkeypatch.setattr(HummingKernel, "pack", packed)
    monkeypatch.setattr(humming_experts, "launch_indexed", multiply)
    monkeypatch.setattr(humming_experts, "kernels_of_experts", lambda *kind: (None, [(1 << 30, 4)]))
    monkeypatch.setattr(vllm_blocks, "moe_align_block_size", blocks_by_expert)
    layer, weights = test_moe.ready_layer(declared, local=local)
    for tokens in (1, 40):
        x, shares, ids = test_moe.route(tokens)
        launches.clear()
        result = layer.quant_method.multiply(layer, x, shares, ids)
        there = torch.tensor([i in local for i in range(4)])
        exact = test_moe.expected(weights, x.float(), shares * there[ids.long()], ids)
        assert relative_error(result, exact) < 1e-2
        if len(local) == 4:  # w13: three experts alone, gate and up of another; w2: two together, two alone
            assert sorted(launches) == sorted([1, 1, 1, 1, 1, 2, 1, 1])


def test_an_unknown_way_to_multiply_experts_is_refused(monkeypatch):
    assert not humming_experts.wanted()
    monkeypatch.setenv("GAMMA_HUMMING_EXPERTS", "yes")
    with pytest.raises(ValueError, match="GAMMA_HUMMING_EXPERTS='yes': expected alone or together"):
        humming_experts.wanted()
