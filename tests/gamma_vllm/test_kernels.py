# ruff: noqa: E402 - torch and vllm are optional: imported only when they are there
"""The kernels against the dequantized weight, and the choice between them."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from allocator.contract.layout import ModuleFormat
from allocator.contract.packing import dequantize, pack_codes, pack_zero_points
from allocator.contract.resident import segment_bytes
from gamma_vllm.kernels import torch_reference
from gamma_vllm.kernels.ark import ArkKernel, planned_as
from gamma_vllm.kernels.choose import choose_kernel
from gamma_vllm.kernels.humming import HummingKernel
from gamma_vllm.kernels.native import NativeKernel
from gamma_vllm.kernels.torch_reference import TorchKernel
from gamma_vllm.shards import Segment
from tests.skips import lacking_kernel

CPU = torch.device("cpu")
WIDTHS = (2, 3, 4, 5, 6, 8)


def make_segment(rows, columns, num_bits, group_size, symmetric, scale_dtype=torch.bfloat16):
    """A random segment: its description, its tensors, and its weight in float32."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns + num_bits)
    draw = lambda *shape: torch.randint(0, 1 << num_bits, shape, generator=generator)  # noqa: E731
    groups = columns // group_size
    tensors = {
        "packed": pack_codes(draw(rows, columns), num_bits),
        "scale": (torch.rand(rows, groups, generator=generator) * 0.1 + 0.01).to(scale_dtype),
    }
    if not symmetric:
        tensors["zero_point"] = pack_zero_points(draw(rows, groups), num_bits)
    weight = dequantize(tensors["packed"], tensors["scale"], tensors.get("zero_point"), num_bits)
    return Segment((0,), num_bits, group_size, symmetric, rows, columns), tensors, weight


def planned_bytes(segment, kernel):
    """What a plan says that a packed segment takes, by the formula for `kernel`."""
    kind = {"num_bits": segment.num_bits, "group_size": segment.group_size, "symmetric": segment.symmetric}
    module = ModuleFormat(shape=(segment.rows, segment.columns), **kind)
    return segment_bytes(segment.rows, segment.columns, module, kernel)


def relative_error(given, expected):
    return float((given.float() - expected.float()).norm() / expected.float().norm())


needs_ark = pytest.mark.skipif(ArkKernel.why_not(CPU) is not None, reason=lacking_kernel(ArkKernel.why_not(CPU)))
ark, reference = ArkKernel("fp32"), TorchKernel()


@needs_ark
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("num_bits", WIDTHS)
def test_ark_agrees_with_the_reference(num_bits, symmetric):
    for group_size in (32, 64, 128):
        for rows, columns in ((1, 128), (33, 384), (48, 256), (65, 640)):
            segment, tensors, weight = make_segment(rows, columns, num_bits, group_size, symmetric)
            packed = ark.pack(segment, tensors)
            for tokens in (1, 2, 19):
                x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
                expected = reference.linear(segment, tensors, x)
                assert relative_error(expected, x @ weight.T) < 1e-5
                assert relative_error(ark.linear(segment, packed, x), expected) < 1e-3


@needs_ark
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_a_layer_is_its_segments_side_by_side(tokens, dtype):
    kinds = [(40, 3, 32, False), (24, 16, 0, True), (33, 5, 64, True)]
    segments, held, weights = [], [], []
    for rows, num_bits, group_size, symmetric in kinds:
        if num_bits == 16:
            weights.append(torch.randn(rows, 128).to(dtype).float())
            segments.append(Segment((0,), 16, None, None, rows, 128))
            held.append({"weight": weights[-1].to(dtype)})
        else:
            segment, tensors, weight = make_segment(rows, 128, num_bits, group_size, symmetric)
            segments.append(segment)
            held.append(ark.pack(segment, tensors))
            weights.append(weight)
    x = torch.randn(2, tokens, 128).to(dtype)
    given = ark.layer(segments, held, x)
    assert given.shape == (2, tokens, 97)
    assert given.dtype == dtype
    torch.testing.assert_close(given.float(), x.float() @ torch.cat(weights).T, rtol=2e-2, atol=2e-2)


@needs_ark
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("num_bits", WIDTHS)
def test_bytes_of_a_blob_are_known_ahead(num_bits, symmetric):
    for rows, columns, group_size in ((1, 32, 32), (24, 128, 128), (25, 96, 32), (100, 256, 64), (1024, 384, 128)):
        segment, tensors, _ = make_segment(rows, columns, num_bits, group_size, symmetric)
        blob = ark.pack(segment, tensors)["blob"]
        assert blob.nbytes == planned_bytes(segment, planned_as())


@needs_ark
def test_ark_takes_half_precision_and_strided_activations():
    # Handed to the library as they are, these corrupt memory.
    segment, tensors, weight = make_segment(40, 128, 5, 64, False, torch.float16)
    packed = ark.pack(segment, tensors)
    wide = torch.randn(2, 3, 256)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = wide.to(dtype)[..., ::2]
        output = ark.linear(segment, packed, x)
        assert output.dtype == dtype
        assert output.shape == (2, 3, 40)
        assert relative_error(output, x.float() @ weight.T) < 1e-2
    assert ark.linear(segment, packed, wide[:, :0, :128]).shape == (2, 0, 40)


def test_reference_multiplies_large_weights_block_by_block(monkeypatch):
    segment, tensors, weight = make_segment(101, 128, 3, 32, False)
    monkeypatch.setattr(torch_reference, "BLOCK_ELEMENTS", 128 * 40)
    x = torch.randn(5, 128)
    assert relative_error(reference.linear(segment, tensors, x), x @ weight.T) < 1e-5


@pytest.mark.parametrize("kernel", [reference, pytest.param(ark, marks=needs_ark)])
def test_operators_describe_themselves_to_the_compiler(kernel):
    segment, tensors, _ = make_segment(33, 64, 3, 32, False)
    tensors = kernel.pack(segment, tensors)
    x = torch.randn(4, 64)
    compiled = torch.compile(lambda x: kernel.linear(segment, tensors, x) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), kernel.linear(segment, tensors, x) + 1)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert kernel.linear(segment, tensors, mode.from_tensor(x)).shape == (4, 33)


def test_choice_follows_the_environment(monkeypatch):
    monkeypatch.setenv("GAMMA_KERNEL", "torch")
    assert choose_kernel(CPU) == reference
    monkeypatch.setenv("GAMMA_KERNEL", "auto")
    assert choose_kernel(torch.device("cuda")) == reference
    monkeypatch.setattr(ArkKernel, "why_not", lambda device: None)
    monkeypatch.setattr(NativeKernel, "why_not", lambda device: "no")
    assert choose_kernel(CPU) == ArkKernel("fp32")
    monkeypatch.setattr(NativeKernel, "why_not", lambda device: None)
    assert choose_kernel(CPU) == NativeKernel()
    monkeypatch.setenv("GAMMA_KERNEL", "ark")
    monkeypatch.setenv("GAMMA_ARK_COMPUTE", "int8")
    assert choose_kernel(CPU) == ArkKernel("int8")


def test_a_kernel_that_cannot_run_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setenv("GAMMA_KERNEL", "ark")
    with pytest.raises(RuntimeError, match=r"GAMMA_KERNEL=ark cannot run: .* on cuda"):
        choose_kernel(torch.device("cuda"))
    monkeypatch.setenv("GAMMA_KERNEL", "marlin")
    with pytest.raises(ValueError, match="'marlin': expected auto, humming, native, ark or torch"):
        choose_kernel(CPU)


@pytest.mark.parametrize("kernel", [HummingKernel, NativeKernel, ArkKernel, TorchKernel])
def test_no_kernel_calls_its_codes_as_the_weight_of_16_bits_is_called(kernel):
    """Experts keep the tensors of one name in one tensor, those of experts at 16 bits too."""
    for symmetric in (True, False):
        segment, _, _ = make_segment(64, 64, 3, 32, symmetric)
        assert "weight" not in kernel.tensor_names(kernel, segment)


def test_unknown_compute_type_is_refused(monkeypatch):
    monkeypatch.setenv("GAMMA_ARK_COMPUTE", "int4")
    with pytest.raises(ValueError, match="GAMMA_ARK_COMPUTE='int4': expected one of fp32, bf16, int8"):
        ArkKernel()


@needs_ark
def test_ark_refuses_activations_of_another_size():
    segment, tensors, _ = make_segment(8, 64, 4, 32, True)
    with pytest.raises(ValueError, match="128 activations for a weight of 64 columns"):
        ark.linear(segment, ark.pack(segment, tensors), torch.zeros(1, 128))


@needs_ark
@pytest.mark.parametrize("compute", ["bf16", "int8"])
def test_other_compute_types_of_ark_are_close(compute):
    kernel = ArkKernel(compute)
    segment, tensors, weight = make_segment(48, 256, 5, 64, False)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    assert relative_error(kernel.linear(segment, kernel.pack(segment, tensors), x), x @ weight.T) < 2e-2
