"""The digest that identifies a model: every byte of every tensor, and config.json less its volatile keys."""

import hashlib
from collections.abc import Callable, Iterator

from allocator.contract.digest import digest_model
from allocator.contract.errors import ContractError
from allocator.contract.safetensors_file import StoredTensor
from allocator.inventory.finite import refuse_not_finite
from allocator.inventory.inventory import Inventory

__all__ = ["VOLATILE_CONFIG_KEYS", "model_digest"]

VOLATILE_CONFIG_KEYS = frozenset({"_name_or_path", "_commit_hash", "transformers_version"})
"""Keys of config.json that say where it came from and nothing of the model."""

_CHUNK_BYTES = 1 << 22

BytesRead = Callable[[int, int], None]


def model_digest(inventory: Inventory, progress: BytesRead | None = None) -> str:
    """Digest over (name, dtype, shape, content) of each tensor of the model and its config.

    Reads every weight once, 4 MiB at a time. `progress(bytes_read, bytes_in_all)` is called after each chunk.
    Tensors that a checkpoint drops (a tied lm_head stored twice) do not count, nor does the cut into files.
    Raises ContractError when a file is shorter than its header says, or a number of a tensor is NaN or infinite.
    """
    if inventory.channels is not None:
        raise ValueError("the digest of a model is that of its own tensors, before they are cut into channel blocks")
    tensors = [*(m.tensor for m in inventory.modules), *inventory.others]
    config = {key: value for key, value in inventory.config.items() if key not in VOLATILE_CONFIG_KEYS}
    return digest_model(_contents(tensors, progress), config)


def _contents(
    tensors: list[StoredTensor], progress: BytesRead | None
) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
    total, done = sum(t.nbytes for t in tensors), 0
    for tensor in sorted(tensors, key=lambda t: (t.path, t.start)):
        digest, left = hashlib.sha256(), tensor.nbytes
        with tensor.path.open("rb") as file:
            file.seek(tensor.start)
            while left:
                chunk = file.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise ContractError(f"{tensor.path}: ends inside tensor {tensor.name}; download the model again")
                refuse_not_finite(tensor, chunk, tensor.nbytes - left)
                digest.update(chunk)
                left -= len(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
        yield tensor.name, tensor.dtype, tensor.shape, "sha256:" + digest.hexdigest()
