"""What is in a model, read from config.json and the safetensors headers: no weights, no torch."""

from allocator.inventory.digest import model_digest
from allocator.inventory.inventory import Inventory, Module, read_inventory
from allocator.inventory.shape import ModelShape, read_shape

__all__ = ["Inventory", "ModelShape", "Module", "model_digest", "read_inventory", "read_shape"]
