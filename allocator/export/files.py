"""Which tensor goes into which file, and how many bytes each file will have: known before anything is written."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from allocator.contract.layout import TensorSpec, module_tensors
from allocator.contract.manifest import Manifest
from allocator.contract.safetensors_file import predict_file_bytes

__all__ = ["MAX_SHARD_BYTES", "CheckpointPlan", "plan_checkpoint"]

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class CheckpointPlan:
    """File name -> its tensors. `index` is the text of the index file, None for a single file."""

    files: dict[str, list[TensorSpec]]
    index: str | None

    @property
    def tensor_bytes(self) -> int:
        return sum(t.nbytes for tensors in self.files.values() for t in tensors)

    def file_bytes(self) -> dict[str, int]:
        """Exact size of every safetensors file, headers included."""
        return {name: predict_file_bytes(tensors) for name, tensors in self.files.items()}


def plan_checkpoint(
    manifest: Manifest, others: Sequence[TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES
) -> CheckpointPlan:
    """Lay the manifest's modules and the tensors outside the program out into files of at most `max_shard_bytes`."""
    groups = [module_tensors(name, module, manifest.dtype) for name, module in manifest.modules.items()]
    groups += [[TensorSpec(t.name, t.dtype, t.shape)] for t in others]
    shards: list[list[TensorSpec]] = [[]]
    used = 0
    for group in groups:  # a module stays in one file
        size = sum(t.nbytes for t in group)
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1] += group
        used += size
    if len(shards) == 1:
        return CheckpointPlan({"model.safetensors": shards[0]}, None)
    files = {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}
    weight_map = {t.name: name for name, shard in files.items() for t in shard}
    total = sum(t.nbytes for shard in shards for t in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return CheckpointPlan(files, json.dumps(index, indent=2) + "\n")
