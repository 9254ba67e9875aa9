"""Embeddings and lm_heads below 16 bits: rows gathered and dequantized, logits multiplied by the kernel.

A tied model has one module for both. Its embedding layer keeps the packed rows for the gather and what the
kernel multiplies with (the same tensors for the torch and native kernels, a second copy in another order for the
others); its lm_head layer has no tensors and asks the embedding.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs

from allocator.contract.errors import ContractError
from allocator.contract.layout import Dtype16
from allocator.contract.packing import unpack_codes
from gamma_vllm.compatibility import layer_prefix
from gamma_vllm.kernels.base import define
from gamma_vllm.kernels.native import NativeKernel
from gamma_vllm.linear import GammaLinearMethod, parameter_name, register_held
from gamma_vllm.shards import CheckpointModule, Segment, plan_vocabulary

__all__ = ["GammaVocabularyMethod", "TiedHeadMethod", "gather_rows"]


class GammaVocabularyMethod(GammaLinearMethod):
    """A quantized embedding (`gathers`), lm_head (`multiplies`), or both in one. The vocabulary is padded by vLLM.

    `lends_weight`: while the model is loaded it has its weight at 16 bits too, of whose rows vLLM makes the scores of a
    reranker.
    """

    def __init__(
        self,
        module: CheckpointModule,
        checkpoint_dtype: Dtype16,
        *,
        gathers: bool = False,
        multiplies: bool = False,
        lends_weight: bool = False,
    ):
        super().__init__([module], checkpoint_dtype)
        self.gathers = gathers
        self.multiplies = multiplies
        self.lends_weight = lends_weight
        self.params_dtype = torch.get_default_dtype()

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the flat parameters. Raises ContractError when the module has another shape than the layer."""
        assert isinstance(layer, VocabParallelEmbedding)
        module = self.modules[0]
        if layer.num_added_embeddings:
            raise ContractError(
                f"{module.name}: the model adds {layer.num_added_embeddings} tokens to the vocabulary of the "
                "checkpoint, which a quantized module has no room for; export it again at 16 bits"
            )
        self.params_dtype = params_dtype
        start = layer.shard_indices.padded_org_vocab_start_index
        shard = plan_vocabulary(module, layer.org_vocab_size, input_size, start, sum(output_partition_sizes))
        self._register(layer, [shard], layer_prefix(layer) or module.name, params_dtype)
        if self.lends_weight:
            whole = torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype)
            layer.register_parameter("weight", nn.Parameter(whole, requires_grad=False))
            set_weight_attrs(layer.weight, {"weight_loader": layer.weight_loader})
        else:
            _register_empty_weight(layer, params_dtype)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if isinstance(getattr(layer, "weight", None), nn.Parameter):
            del layer.weight
            _register_empty_weight(layer, self.params_dtype)
        super().process_weights_after_loading(layer)

    def _keep(self, layer: nn.Module, number: int, segment: Segment, tensors: dict[str, Tensor]) -> None:
        kept: dict[int, nn.Parameter] = {}

        def register(name: str, tensor: Tensor) -> None:
            parameter = kept.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
            layer.register_parameter(name, parameter)

        if self.gathers:
            for name, tensor in tensors.items():
                register(_row_name(name), tensor)
        if self.multiplies:
            for name, tensor in self.kernel.pack(segment, tensors).items():
                if name in self.kernel.buffers:
                    register_held(layer, self.kernel, name, parameter_name(number, name), tensor)
                else:
                    register(parameter_name(number, name), tensor)

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """Token numbers `[...]` to rows `[..., hidden_size]` in the model's dtype."""
        packed, scale = (getattr(layer, _row_name(name)) for name in ("packed", "scale"))
        zero_point = getattr(layer, _row_name("zero_point"), None)
        bits = self.segments[0].num_bits
        if isinstance(self.kernel, NativeKernel) and self.params_dtype == torch.bfloat16:
            return self.kernel.gather_rows(input_, packed, scale, zero_point, bits)
        return torch.ops.gamma.gather_rows(input_, packed, scale, zero_point, bits, self.params_dtype)


class TiedHeadMethod(QuantizeMethodBase):
    """The lm_head of a model whose quantized embedding multiplies as well: no tensors of its own."""

    def __init__(self) -> None:
        self.embedding_layer: list[nn.Module] = []  # a list, so that torch does not see a submodule

    def create_weights(self, layer: nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None:
        _register_empty_weight(layer, torch.get_default_dtype())

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        self.embedding_layer = [embed_tokens]
        return layer

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` `[..., hidden_size]` to the logits of this rank's rows."""
        embedding: Any = self.embedding_layer[0]
        return embedding.quant_method.apply(embedding, x, bias)


def _register_empty_weight(layer: nn.Module, dtype: torch.dtype) -> None:
    """LoRA asks the layers of the vocabulary for the device and dtype of `weight`."""
    layer.register_buffer("weight", torch.empty(0, dtype=dtype), persistent=False)


def _row_name(name: str) -> str:
    return f"gamma_rows_{name}"


def gather_rows(
    ids: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, num_bits: int, dtype: torch.dtype
) -> Tensor:
    """Rows `ids` (int64 `[...]`) of a quantized module `[N, K]`, dequantized: `[..., K]` in `dtype`.

    Only the gathered rows are unpacked. packed, scale and zero_point as in `allocator.contract.packing.dequantize`.
    """
    flat = ids.reshape(-1)
    if not flat.numel():
        return _fake(ids, packed, scale, zero_point, num_bits, dtype)
    codes = unpack_codes(packed[flat], num_bits)
    scales = scale[flat].to(torch.float32).unsqueeze(-1)
    grouped = codes.to(torch.float32).reshape(*scales.shape[:2], -1)
    if zero_point is None:
        grouped -= float(1 << (num_bits - 1))
    else:
        grouped -= _gather_zero_points(flat, zero_point, num_bits).to(torch.float32).unsqueeze(-1)
    return (grouped * scales).reshape(*ids.shape, -1).to(dtype)


def _gather_zero_points(rows: Tensor, packed: Tensor, num_bits: int) -> Tensor:
    """Zero points `[len(rows), groups]` out of words packed along the rows; a code may straddle two words."""
    word, shift = rows * num_bits // 32, (rows * num_bits % 32).unsqueeze(-1)
    low = packed[word].to(torch.int64) & 0xFFFFFFFF
    high = packed[(word + 1).clamp(max=packed.shape[0] - 1)].to(torch.int64) & 0xFFFFFFFF
    return ((high << 32 | low) >> shift) & ((1 << num_bits) - 1)


def _fake(
    ids: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, num_bits: int, dtype: torch.dtype
) -> Tensor:
    return packed.new_empty((*ids.shape, packed.shape[1] * 32 // num_bits), dtype=dtype)


def _fake_bfloat16(ids: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, num_bits: int) -> Tensor:
    return _fake(ids, packed, scale, zero_point, num_bits, torch.bfloat16)


_SCHEMA = "(Tensor ids, Tensor packed, Tensor scale, Tensor? zero_point, int num_bits"
define("gather_rows", f"{_SCHEMA}, ScalarType dtype) -> Tensor", gather_rows, _fake)
for _name in (
    "native_gather_rows",
    "native_avx2_gather_rows",
):  # native_avx512.cpp and native_avx2.cpp have the implementations
    define(_name, f"{_SCHEMA}) -> Tensor", None, _fake_bfloat16)
