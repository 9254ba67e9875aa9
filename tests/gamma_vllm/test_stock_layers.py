"""vLLM's own compressed-tensors layers take our tensors at every width: names, shapes and dtypes.

Only the choice of a kernel is replaced, since no stock kernel runs widths other than 4 on a CPU.
"""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from allocator.contract.compressed_tensors import compressed_tensors_config  # noqa: E402
from allocator.contract.packing import dequantize, unpack_codes  # noqa: E402
from tests.e2e.make_checkpoint import quantize  # noqa: E402
from tests.skips import lacking  # noqa: E402

PREFIX = "model.layers.0"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Unpacked:
    """Stands in for a kernel: keeps what it is told of the tensors."""

    def __init__(self, config, **names):
        self.config, self.names = config, names


@pytest.fixture
def stock_layers(parallel, monkeypatch):
    """Makes a fused and a plain layer the way vLLM does for a compressed-tensors checkpoint."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16

    monkeypatch.setattr(compressed_tensors_wNa16, "choose_mp_linear_kernel", lambda config: Unpacked)

    def make(modules):
        config = CompressedTensorsConfig.from_config(compressed_tensors_config(modules))
        config.packed_modules_mapping = FUSED
        with set_current_vllm_config(VllmConfig()):
            up = MergedColumnParallelLinear(
                128, [64, 64], bias=False, quant_config=config, prefix=f"{PREFIX}.mlp.gate_up_proj"
            )
            down = RowParallelLinear(64, 128, bias=False, quant_config=config, prefix=f"{PREFIX}.mlp.down_proj")
        return up, down

    return make


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 5, 6, 8])
def test_stock_layers_load_our_tensors(stock_layers, num_bits, symmetric):
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16

    if not symmetric and num_bits not in compressed_tensors_wNa16.WNA16_ZP_SUPPORTED_TYPES_MAP:
        pytest.skip(lacking("vllm", "this vLLM has zero points at 4 and 8 bits only"))
    generator = torch.Generator().manual_seed(num_bits)
    stored, formats = {}, {}
    for name, shape in (("gate_proj", (64, 128)), ("up_proj", (64, 128)), ("down_proj", (128, 64))):
        weight = torch.randn(*shape, generator=generator)
        bits = num_bits if name != "down_proj" else 16
        stored[name], formats[f"{PREFIX}.mlp.{name}"] = quantize(weight, bits, 32 if bits != 16 else None, symmetric)
    up, down = stock_layers(formats)
    assert set(dict(up.named_parameters())) == set(stored["gate_proj"])
    assert set(dict(down.named_parameters())) == {"weight"}
    for index, name in enumerate(("gate_proj", "up_proj")):
        for part, tensor in stored[name].items():
            parameter = getattr(up, part)
            parameter.weight_loader(parameter, tensor, index) if part != "weight_shape" else None
    codes = torch.cat([unpack_codes(stored[n]["weight_packed"], num_bits) for n in ("gate_proj", "up_proj")])
    assert torch.equal(unpack_codes(up.weight_packed.data, num_bits), codes)
    config = up.scheme.kernel.config
    assert (config.weight_type.size_bits, config.group_size, config.zero_points) == (num_bits, 32, not symmetric)
    zeros = None if symmetric else up.weight_zero_point.data
    both = dequantize(up.weight_packed.data, up.weight_scale.data, zeros, num_bits)
    parts = [stored[n] for n in ("gate_proj", "up_proj")]
    expected = [
        dequantize(p["weight_packed"], p["weight_scale"].float(), p.get("weight_zero_point"), num_bits) for p in parts
    ]
    assert torch.equal(both, torch.cat(expected))
