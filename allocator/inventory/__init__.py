"""What is in a model, read from config.json and the safetensors headers: no weights, no torch."""

from allocator.inventory.channels import ArrangedTensor, channel_layout, cut_unsorted, with_channel_blocks
from allocator.inventory.config import find_config
from allocator.inventory.digest import model_digest
from allocator.inventory.digest_cache import DIGEST_CACHE_NAME, cached_model_digest
from allocator.inventory.inventory import Inventory, Module, read_inventory
from allocator.inventory.shape import ModelShape, read_shape
from allocator.inventory.side_files import CARRIED_FOLDERS, SideFiles, carry, copy_whole, side_files

__all__ = [
    "CARRIED_FOLDERS",
    "DIGEST_CACHE_NAME",
    "ArrangedTensor",
    "Inventory",
    "ModelShape",
    "Module",
    "SideFiles",
    "cached_model_digest",
    "carry",
    "channel_layout",
    "copy_whole",
    "cut_unsorted",
    "find_config",
    "model_digest",
    "read_inventory",
    "read_shape",
    "side_files",
    "with_channel_blocks",
]
