"""Fused layers of an MLP whose modules are cut into channel blocks (see `allocator.contract.channel_blocks`).

Piece j of gate_proj and piece j of up_proj are a small fused layer of their own, `gate_up_proj.rows.j`: it has the
names that vLLM makes of the checkpoint's, is loaded, packed, reloaded and checked like any other, and its two modules
are one product if they are of one kind. The layer multiplies with all of them in one call and puts the channels into
the order in which down_proj has them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearMethodBase

from allocator.contract.channel_blocks import ChannelBlocks
from allocator.contract.errors import ContractError
from allocator.contract.layout import Dtype16
from gamma_vllm.compatibility import layer_prefix
from gamma_vllm.linear import GammaLinearMethod
from gamma_vllm.shards import CheckpointModule

__all__ = ["GammaPiecesMethod"]


class GammaPiecesMethod(LinearMethodBase):
    """Makes the pieces of one layer and multiplies with them. Each layer has its own object.

    modules: of each piece, those that vLLM joins (gate and up), in its order.
    """

    def __init__(self, modules: Sequence[Sequence[CheckpointModule]], layout: ChannelBlocks, checkpoint_dtype: Dtype16):
        self.layout = layout
        self.joined = len(modules[0])
        self.pieces = [GammaLinearMethod(list(of_piece), checkpoint_dtype) for of_piece in modules]

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
        """Make the pieces, modules `rows.0`, `rows.1`, ... of `layer`, with their parameters.

        Raises ContractError when the config contradicts the layer, when there are more ranks than chunks, and with
        LoRA: adapters are made for the channels in the order of the original model.
        """
        prefix, tp_size = layer_prefix(layer), getattr(layer, "tp_size", 1)
        config = get_current_vllm_config_or_none()
        if config is not None and config.lora_config is not None:
            raise ContractError(
                f"layer {prefix}: its channels are sorted, and LoRA adapters are for their original order; serve "
                "without --enable-lora, or a checkpoint learned with --granularity module"
            )
        if self.layout.chunks % tp_size:
            raise ContractError(
                f"layer {prefix}: its channels are laid out in {self.layout.chunks} chunks, which tensor_parallel_size "
                f"{tp_size} does not divide; possible are {_divisors(self.layout.chunks)}"
            )
        blocks = self.layout.blocks
        layer.rows = nn.ModuleList()
        for number, method in enumerate(self.pieces):
            piece = _Piece(f"{prefix}.rows.{number}", getattr(layer, "tp_rank", 0), tp_size, method)
            sizes = [size // blocks for size in output_partition_sizes]
            method.create_weights(
                piece, input_size_per_partition, sizes, input_size, output_size // blocks, params_dtype
            )
            layer.rows.append(piece)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing: vLLM comes to the pieces by themselves."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` `[..., in_features]` to `[..., out_features]` of this rank, in the dtype of `x`: all channels of gate,
        then all of up, as down_proj takes them."""
        pieces: Any = layer.rows
        segments = [segment for method in self.pieces for segment in method.segments]
        tensors = [held for method, piece in zip(self.pieces, pieces, strict=True) for held in method.held(piece)]
        output = self.pieces[0].kernel.layer(segments, tensors, x)
        chunks = self.layout.chunks // getattr(layer, "tp_size", 1)
        # [..., piece, gate or up, chunk, channel] to [..., gate or up, chunk, piece, channel]
        by_piece = output.view(*output.shape[:-1], self.layout.blocks, self.joined, chunks, -1)
        output = by_piece.movedim(-4, -2).reshape(output.shape)
        return output if bias is None else output.add_(bias)


class _Piece(nn.Module):
    """What a method for linear layers has to know of its layer."""

    def __init__(self, prefix: str, tp_rank: int, tp_size: int, quant_method: GammaLinearMethod):
        super().__init__()
        self.prefix, self.tp_rank, self.tp_size = prefix, tp_rank, tp_size
        self.quant_method = quant_method


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
