"""The model that a plan is for: its shape, and the widths of its modules if it is a gamma checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from allocator.contract.channels import ChannelBlocks
from allocator.contract.checkpoint import CheckpointConfig
from allocator.contract.layout import ModuleFormat
from allocator.inventory.config import find_config, refuse_quantized
from allocator.inventory.shape import ModelShape, read_shape

__all__ = ["PlannedModel", "read_model"]


@dataclass(frozen=True)
class PlannedModel:
    """`formats` and `channel_blocks` are those of a checkpoint, None for a model at 16 bits."""

    name: str
    shape: ModelShape
    formats: dict[str, ModuleFormat] | None
    channel_blocks: ChannelBlocks | None = None

    def check_ranks(self, tensor_parallel_size: int) -> None:
        """Raises InputError for a checkpoint that vLLM cannot split so."""
        if self.channel_blocks is not None:
            self.channel_blocks.check_ranks(tensor_parallel_size)


def read_model(model: str, revision: str | None = None) -> PlannedModel:
    """From config.json alone: of a folder, a file, or a hub id. Raises InputError, also for other quantized models."""
    config = dict(find_config(model, revision))
    quantized = config.get("quantization_config")
    formats = channel_blocks = None
    if isinstance(quantized, dict) and quantized.get("quant_method") == CheckpointConfig.QUANT_METHOD:
        checkpoint = CheckpointConfig.parse(config.pop("quantization_config"))
        formats, channel_blocks = dict(checkpoint.modules), checkpoint.channel_blocks
    refuse_quantized(config, model)
    name = model.rstrip("/") if not Path(model).exists() else Path(model).resolve().name
    return PlannedModel(name, read_shape(config), formats, channel_blocks)
