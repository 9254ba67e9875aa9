"""Hugging Face transformers loads gamma checkpoints: `AutoModelForCausalLM.from_pretrained(DIR)`.

transformers has no entry point for quantizers, so this module has to be imported first:

    import allocator.integrations.transformers

A program that does not import it is started through it, with its own arguments:

    python -m allocator.integrations lm_eval run --model hf --model_args pretrained=DIR --tasks lambada

Modules stay packed in memory and are dequantized in float32 at each use, so that a model needs little more memory than
its checkpoint has bytes. This is the slow and exact way; vLLM is the fast one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from allocator.blocks.structure import cut_rows
from allocator.contract.checkpoint import CheckpointConfig
from allocator.contract.errors import ContractError
from allocator.contract.layout import Dtype16, ModuleFormat, module_tensors
from allocator.contract.packing import dequantize, dequantize_rows

__all__ = ["GammaHfConfig", "GammaHfQuantizer", "PackedEmbedding", "PackedLinear", "TiedHead"]

_DTYPES = {"I32": torch.int32, "I64": torch.int64, "BF16": torch.bfloat16, "F16": torch.float16}


class _Packed(nn.Module):
    """The tensors of one quantized module, under the names that the checkpoint has."""

    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor
    weight_zero_point: Tensor | None

    def __init__(self, module: ModuleFormat, dtype: Dtype16):
        super().__init__()
        self.format = module
        self.weight_zero_point = None
        for tensor in module_tensors("", module, dtype):
            empty = torch.empty(tensor.shape, dtype=_DTYPES[tensor.dtype])
            setattr(self, tensor.name[1:], nn.Parameter(empty, requires_grad=False))

    def extra_repr(self) -> str:
        group = f"group {self.format.group_size}, {'symmetric' if self.format.symmetric else 'asymmetric'}"
        return f"{list(self.format.shape)}, {self.format.num_bits} bits, {group}"

    def dequantized(self) -> Tensor:
        """The float32 weight `[N, K]`."""
        return dequantize(self.weight_packed, self.weight_scale, self.weight_zero_point, self.format.num_bits)


class PackedLinear(_Packed):
    """Stands in for `nn.Linear`."""

    def __init__(self, module: ModuleFormat, dtype: Dtype16, bias: bool):
        super().__init__(module, dtype)
        self.out_features, self.in_features = module.shape
        self.bias = nn.Parameter(torch.empty(self.out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)


class PackedEmbedding(_Packed):
    """Stands in for `nn.Embedding`: only the rows looked up are dequantized, to `model_dtype`."""

    def __init__(self, module: ModuleFormat, dtype: Dtype16, model_dtype: torch.dtype):
        super().__init__(module, dtype)
        self.num_embeddings, self.embedding_dim = module.shape
        self.model_dtype = model_dtype

    def forward(self, ids: Tensor) -> Tensor:
        rows = dequantize_rows(
            ids.reshape(-1), self.weight_packed, self.weight_scale, self.weight_zero_point, self.format.num_bits
        )
        return rows.reshape(*ids.shape, -1).to(self.model_dtype)


class TiedHead(nn.Module):
    """The lm_head of a model whose quantized embedding it shares: no tensors of its own."""

    def __init__(self, embedding: PackedEmbedding):
        super().__init__()
        self._embedding = (embedding,)  # a tuple, so that its tensors are not listed twice

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._embedding[0].dequantized().to(x.dtype))


@register_quantization_config(CheckpointConfig.QUANT_METHOD)
class GammaHfConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not typed
    """`quantization_config` of a gamma checkpoint, checked by the contract."""

    def __init__(self, **config: Any):
        self.quant_method = CheckpointConfig.QUANT_METHOD
        self.checkpoint = CheckpointConfig.parse({"quant_method": self.quant_method} | config)

    def to_dict(self) -> dict[str, Any]:
        return self.checkpoint.model_dump(mode="json", exclude_none=True)


@register_quantizer(CheckpointConfig.QUANT_METHOD)
class GammaHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts packed modules in the place of those that the checkpoint declares below 16 bits."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **_kwargs: Any) -> None:
        checkpoint = self.quantization_config.checkpoint
        cut_rows(model, {name: list(of.values()) for name, of in checkpoint.parents.rows().items()})
        modules = dict(model.named_modules())
        for name, module in checkpoint.modules.items():
            if not module.quantized:
                continue
            place = modules.get(name)
            if not isinstance(place, nn.Linear | nn.Embedding):
                found = "none" if place is None else f"a {type(place).__name__}"
                raise ContractError(
                    f"{name}: transformers has {found} in this place of {type(model).__name__} and cannot keep it at "
                    f"{module.num_bits} bits; serve the checkpoint with vLLM, or export it with this module at 16 bits"
                )
            if tuple(place.weight.shape) != module.shape:
                raise ContractError(
                    f"{name}: quantization_config says shape {list(module.shape)}, "
                    f"transformers has {list(place.weight.shape)}"
                )
            model.set_submodule(name, _packed(place, module, checkpoint.dtype))
        _tie_head(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _packed(place: nn.Linear | nn.Embedding, module: ModuleFormat, dtype: Dtype16) -> _Packed:
    with torch.device("meta"):
        if isinstance(place, nn.Embedding):
            return PackedEmbedding(module, dtype, place.weight.dtype)
        return PackedLinear(module, dtype, place.bias is not None)


def _tie_head(model: Any) -> None:
    """Let the lm_head of a tied model use the embedding's packed tensors, and transformers know of no tie."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, PackedEmbedding) or not model.config.get_text_config().tie_word_embeddings:
        return
    for name, module in list(model.named_modules()):
        if module is model.get_output_embeddings():
            model.set_submodule(name, TiedHead(embedding))
            model.all_tied_weights_keys.pop(f"{name}.weight", None)
