"""Which declaration a checkpoint gets: `gamma`, or `compressed-tensors` where the widths allow it."""

from typing import Literal

from allocator.contract.compressed_tensors import unequal_groups
from allocator.contract.errors import InputError
from allocator.contract.manifest import Manifest
from allocator.inventory import Inventory

__all__ = ["Declaration", "check_declarable"]

Declaration = Literal["gamma", "compressed-tensors"]

_SHOWN_GROUPS = 3


def check_declarable(manifest: Manifest, inventory: Inventory, declaration: Declaration) -> None:
    """Raises InputError, with the names, when stock vLLM cannot load the manifest's widths."""
    if declaration == "gamma":
        return
    if manifest.channel_blocks is not None:
        raise InputError(
            f"the manifest cuts modules into {manifest.channel_blocks.blocks} channel blocks, which compressed-tensors "
            "cannot say; export with --format gamma, or learn and solve with --granularity module"
        )
    for module in inventory.modules:
        stored = manifest.modules[module.name]
        if module.role == "embedding" and stored.quantized:
            raise InputError(
                f"{module.name}: {stored.num_bits} bits, but stock vLLM and transformers look tokens up in a 16-bit "
                f"embedding; solve again with --pin '{module.name}=16', or export with --format gamma"
            )
    if not any(module.quantized for module in manifest.modules.values()):
        raise InputError("no module of the manifest is below 16 bits; the model itself is that checkpoint")
    unequal = unequal_groups(manifest.modules, inventory.fused_groups)
    if unequal:
        shown = [f"{layer} ({_ways(layer, ways)})" for layer, ways in list(unequal.items())[:_SHOWN_GROUPS]]
        more = f"; and {len(unequal) - _SHOWN_GROUPS} more" if len(unequal) > _SHOWN_GROUPS else ""
        raise InputError(
            f"compressed-tensors allows one width inside a layer that vLLM fuses, the manifest has several in "
            f"{'; '.join(shown)}{more}; solve again with --fusion tied, or export with --format gamma"
        )


def _ways(layer: str, ways: dict[str, str]) -> str:
    parent = layer.rpartition(".")[0] + "."
    return ", ".join(f"{name.removeprefix(parent)} {way}" for name, way in ways.items())
