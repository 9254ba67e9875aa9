"""What is in a model, read from config.json and the safetensors headers: no weights, no torch."""

from allocator.model.candidate_formats import CandidateFormats
from allocator.model.channel_cuts import ArrangedTensor, channel_layout, cut_unsorted, in_channel_order
from allocator.model.hf_config import find_config
from allocator.model.identity import DIGEST_CACHE_NAME, cached_model_digest, model_digest
from allocator.model.inventory import Inventory, Module, read_inventory
from allocator.model.shape import ModelShape, read_shape
from allocator.model.side_files import CARRIED_FOLDERS, SideFiles, carry, copy_whole, side_files

__all__ = [
    "CARRIED_FOLDERS",
    "DIGEST_CACHE_NAME",
    "ArrangedTensor",
    "CandidateFormats",
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
    "in_channel_order",
    "model_digest",
    "read_inventory",
    "read_shape",
    "side_files",
]
