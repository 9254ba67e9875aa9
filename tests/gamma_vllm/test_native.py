# ruff: noqa: E402 - torch and vllm are optional: imported only when they are there
"""Our CPU kernels against the dequantized weight, and what they do without a compiler or the right CPU."""

import logging

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from gamma_vllm.kernels import native
from gamma_vllm.kernels.choose import choose_kernel
from gamma_vllm.kernels.native import NativeKernel, usable_isas
from gamma_vllm.shards import Segment
from tests.gamma_vllm.test_kernels import CPU, WIDTHS, make_segment, planned_bytes, relative_error
from tests.skips import lacking, lacking_kernel

WHY_NOT = NativeKernel.why_not(CPU)
needs_native = pytest.mark.skipif(WHY_NOT is not None, reason=lacking_kernel(WHY_NOT))
SYMMETRY = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


@pytest.fixture(params=["avx512", "avx2"])
def kernel(request):
    """The kernel of each instruction set that this CPU has; AVX2 on CPUs that have more as well."""
    if request.param not in usable_isas():
        pytest.skip(lacking_kernel(WHY_NOT or f"this CPU has not all of {request.param}"))
    return NativeKernel(request.param)


@needs_native
@SYMMETRY
@pytest.mark.parametrize("num_bits", WIDTHS)
def test_products_are_those_of_the_dequantized_weight(kernel, num_bits, symmetric):
    for rows, columns, group_size in (
        (1, 128, 64),
        (33, 96, 32),
        (48, 384, 128),
        (65, 640, 64),
        (19, 4224, 128),
        (35, 2080, 32),
    ):
        segment, tensors, weight = make_segment(rows, columns, num_bits, group_size, symmetric)
        packed = kernel.pack(segment, tensors)
        assert sum(t.nbytes for t in packed.values()) == planned_bytes(segment, "native")
        # Code by code, in fours, twos and ones; in panels or tiles, of which some are not full; dequantized.
        for tokens in (1, 2, 3, 7, 10, 16, 21, 33, 60, 90):
            x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
            for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)):
                product = kernel.linear(segment, packed, x.to(dtype))
                assert product.dtype == dtype
                expected = x.to(dtype).double() @ weight.double().T
                assert relative_error(product, expected) < limit, (rows, columns, tokens, dtype)


@pytest.fixture(params=[False, True], ids=["registers", "tiles"])
def amx(request):
    """Prefill with AMX, which not all CPUs have, and without."""
    if "avx512" not in usable_isas():
        if request.param:
            pytest.skip(lacking("instruction", "this CPU has no AMX"))
        yield
        return
    library = native.library("avx512")
    seen = "amx_bf16" in native.cpu_flags()
    if library.gamma_use_amx(request.param and seen) != request.param:
        pytest.skip(lacking("instruction", "this CPU has no AMX"))
    yield
    library.gamma_use_amx(seen)


@needs_native
@pytest.mark.parametrize(("rows", "columns"), [(600, 2176), (40, 5120), (1024, 1024)])
def test_products_in_prefill(amx, kernel, rows, columns):
    """More rows, columns and activations than stay in a cache at a time; several widths, none and all filling tiles."""
    parts = [
        make_segment(rows, columns, bits, 128, symmetric) for bits, symmetric in ((3, False), (8, True), (6, False))
    ]
    dense = torch.randn(24, columns, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    segments = [segment for segment, _, _ in parts] + [Segment((9,), 16, None, None, 24, columns)]
    held = [kernel.pack(segment, tensors) for segment, tensors, _ in parts] + [{"weight": dense}]
    whole = torch.cat([*(weight for _, _, weight in parts), dense.float()])
    for tokens in (1, 17, 33, 130, 1100):
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(torch.bfloat16)
        product = kernel.layer(segments, held, x)
        exact = x.float() @ whole.T
        assert relative_error(product, exact) < 5e-3, tokens
        assert relative_error(product[-1], exact[-1]) < 5e-3, tokens


@needs_native
def test_scales_in_float16(kernel):
    segment, tensors, weight = make_segment(40, 128, 5, 64, False, torch.float16)
    x = torch.randn(2, 3, 256)[..., ::2].to(torch.float16)
    assert relative_error(kernel.linear(segment, kernel.pack(segment, tensors), x), x.float() @ weight.T) < 1e-3


@needs_native
def test_nothing_behind_the_weight_is_read(kernel):
    """The rows of one module end where another's begin; what stands there must not count."""
    segment, tensors, weight = make_segment(16, 64, 3, 32, True)
    words = tensors["packed"].numel()
    storage = torch.full((words + 64,), -1, dtype=torch.int32)
    storage[:words] = tensors["packed"].flatten()
    tensors["packed"] = storage[:words].view(16, -1)
    x = torch.randn(1, 64)
    assert relative_error(kernel.linear(segment, kernel.pack(segment, tensors), x), x @ weight.T) < 1e-4


@needs_native
def test_a_layer_of_several_widths_and_a_dense_part(kernel):
    parts = [make_segment(64, 128, 3, 64, True), make_segment(32, 128, 5, 32, False)]
    dense = torch.randn(24, 128)
    segments = [segment for segment, _, _ in parts] + [Segment((9,), 16, None, None, 24, 128)]
    held = [kernel.pack(segment, tensors) for segment, tensors, _ in parts] + [{"weight": dense}]
    whole = torch.cat([*(weight for _, _, weight in parts), dense])
    for tokens in (1, 5, 20, 60):
        x = torch.randn(2, tokens, 128)
        assert relative_error(kernel.layer(segments, held, x), x @ whole.T) < 1e-4
        halves = [tensors | {"weight": dense.bfloat16()} if "weight" in tensors else tensors for tensors in held]
        product = kernel.layer(segments, halves, x.bfloat16())
        assert product.dtype == torch.bfloat16
        assert relative_error(product, x @ whole.T) < 5e-3
    assert kernel.layer(segments, held, torch.zeros(2, 0, 128)).shape == (2, 0, 120)
    odd, weight = Segment((0,), 16, None, None, 24, 40), torch.randn(24, 40)  # 40 columns: no width but 16 bits
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(33, 40, dtype=dtype)
        assert relative_error(kernel.layer([odd], [{"weight": weight.to(dtype)}], x), x.float() @ weight.T) < 5e-3
    with pytest.raises(ValueError, match="64 activations for a weight of 128 columns"):
        kernel.layer(segments, held, torch.zeros(1, 64))


@needs_native
def test_torch_compile_sees_one_operator(kernel):
    segment, tensors, _ = make_segment(33, 128, 3, 32, False)
    packed = kernel.pack(segment, tensors)
    x = torch.randn(4, 128)
    compiled = torch.compile(lambda x: kernel.linear(segment, packed, x) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), kernel.linear(segment, packed, x) + 1)


@needs_native
def test_large_modules_are_dequantized_piece_by_piece(kernel, monkeypatch):
    monkeypatch.setattr(native, "SPACE_WEIGHTS", 128 * 7)
    segment, tensors, weight = make_segment(50, 128, 6, 32, False)
    dense = Segment((1,), 16, None, None, 9, 128)
    parts = [kernel.pack(segment, tensors), {"weight": torch.randn(9, 128)}]
    x = torch.randn(40, 128)
    expected = x @ torch.cat([weight, parts[1]["weight"]]).T
    assert relative_error(kernel.layer([segment, dense], parts, x), expected) < 1e-4


@needs_native
def test_the_default_dtype_does_not_matter(kernel):
    segment, tensors, weight = make_segment(48, 128, 3, 32, False)
    packed = kernel.pack(segment, tensors)
    native.work_space.cache_clear()
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it makes a model
    try:
        for tokens in (3, 40):
            x = torch.randn(tokens, 128, dtype=torch.float32)
            assert relative_error(kernel.linear(segment, packed, x), x @ weight.T) < 1e-4
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("tokens", [1, 12, 60])
@pytest.mark.parametrize("group_size", [32, 128])
def test_large_and_small_activations_side_by_side(kernel, group_size, tokens):
    """Groups a million times as large as their neighbours must not cost these their last bits."""
    segment, tensors, weight = make_segment(33, 256, 4, group_size, False)
    packed = kernel.pack(segment, tensors)
    sizes = 10.0 ** torch.tensor([-3.0, 3.0]).repeat(4).repeat_interleave(32)
    x = (torch.randn(tokens, 256, generator=torch.Generator().manual_seed(0)) * sizes).bfloat16()
    assert relative_error(kernel.linear(segment, packed, x), x.float() @ weight.T) < 5e-3
    if group_size == 32:
        x[:, sizes > 1] = 0
        assert relative_error(kernel.linear(segment, packed, x), x.float() @ weight.T) < 5e-3
    x[0, 5] = torch.nan
    product = kernel.linear(segment, packed, x)
    assert product[0].isnan().all()
    assert not product[1:].isnan().any()


@pytest.fixture
def fresh(monkeypatch):
    """Nothing is known of the CPU or of libraries, before the test and after it."""
    monkeypatch.delenv("GAMMA_CPU_ISA", raising=False)

    def forget():
        native.library.cache_clear()
        native.why_not_isa.cache_clear()

    yield forget
    monkeypatch.undo()
    forget()


def test_it_says_why_it_cannot_run(fresh, monkeypatch, tmp_path):
    assert "CPUs" in NativeKernel.why_not(torch.device("cuda"))
    monkeypatch.setattr("allocator.contract.cpu.cpu_flags", lambda: frozenset({"avx512f", "fma"}))
    fresh()
    assert "avx512: this CPU has no avx512bw" in NativeKernel.why_not(CPU)
    assert "avx2: this CPU has no avx2, f16c" in NativeKernel.why_not(CPU)
    monkeypatch.setattr("allocator.contract.cpu.cpu_flags", lambda: frozenset({"avx2", "fma", "f16c"}))
    monkeypatch.setattr("vllm.envs.VLLM_CACHE_ROOT", str(tmp_path), raising=False)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    fresh()
    assert "there is no C++ compiler" in NativeKernel.why_not(CPU)


@pytest.mark.skipif("avx2" not in usable_isas(), reason=lacking("instruction", "this CPU has no AVX2"))
def test_avx2_is_taken_where_it_is_the_most_and_the_log_says_why(fresh, monkeypatch, caplog):
    monkeypatch.setattr("allocator.contract.cpu.cpu_flags", lambda: frozenset({"avx2", "fma", "f16c"}))
    monkeypatch.setenv("GAMMA_KERNEL", "auto")
    monkeypatch.delenv("GAMMA_CPU_ISA", raising=False)
    fresh()
    logger = logging.getLogger("vllm.gamma")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="vllm.gamma"):
        kernel = choose_kernel(CPU)
    assert (kernel.name, kernel.isa) == ("native", "avx2")
    assert "use the native kernel on cpu (avx2: this CPU has no avx512f, avx512bw" in caplog.text
