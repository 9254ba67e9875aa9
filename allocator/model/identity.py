"""The digest that identifies a model: all bytes of its tensors, and config.json less volatile keys; and its cache."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from allocator.contract.digest import digest_json, digest_model
from allocator.contract.documents import Digest, Document, Strict
from allocator.contract.errors import ContractError
from allocator.contract.safetensors_file import StoredTensor
from allocator.model.finite_weights import refuse_not_finite
from allocator.model.inventory import Inventory

__all__ = [
    "DIGEST_CACHE_NAME",
    "VOLATILE_CONFIG_KEYS",
    "cached_model_digest",
    "model_digest",
]

VOLATILE_CONFIG_KEYS = frozenset({"_name_or_path", "_commit_hash", "transformers_version"})
"""Keys of config.json that say where it came from and nothing of the model."""

_CHUNK_BYTES = 1 << 22

BytesRead = Callable[[int, int], None]


def model_digest(inventory: Inventory, progress: BytesRead | None = None) -> str:
    """Digest over (name, dtype, shape, content) of each tensor of the model, as the files have it, and its config.

    Reads every weight once, 4 MiB at a time. `progress(bytes_read, bytes_in_all)` is called after each chunk.
    Tensors that a checkpoint drops (a tied lm_head stored twice) do not count, nor does the cut into files.
    Raises ContractError when a file is shorter than its header says, or a number of a tensor is NaN or infinite.
    """
    if inventory.channels is not None:
        raise ValueError("the digest of a model is that of its own tensors, before they are cut into channel blocks")
    config = {key: value for key, value in inventory.declared_config.items() if key not in VOLATILE_CONFIG_KEYS}
    return digest_model(_contents(inventory.stored, progress), config)


def _contents(
    tensors: Sequence[StoredTensor], progress: BytesRead | None
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


DIGEST_CACHE_NAME = "model-digest.json"

_SETTLED_NANOSECONDS = 2_000_000_000


class _FileIdentity(Strict):
    """What the file system says of one file."""

    path: str
    size: int
    inode: int
    modified_ns: int
    changed_ns: int


class _RememberedDigest(Document):
    """The digest of a model and what it was read from."""

    SCHEMA: ClassVar[str] = "gamma.model-digest"

    model_digest: Digest
    headers: Digest
    files: list[_FileIdentity]


def cached_model_digest(inventory: Inventory, cache: Path, progress: BytesRead | None = None) -> str:
    """`model_digest`, from the file `cache` if it was computed from these very files; else computed and kept there."""
    headers, files, now = _headers(inventory), _files(inventory), time.time_ns()
    try:
        known = _RememberedDigest.read(cache)
        if (known.headers, known.files) == (headers, files):
            return known.model_digest
    except ContractError:
        pass  # absent, damaged or of another release: computed anew
    digest = model_digest(inventory, progress)
    settled = all(now - max(f.modified_ns, f.changed_ns) > _SETTLED_NANOSECONDS for f in files)
    if settled and _files(inventory) == files:
        _RememberedDigest(model_digest=digest, headers=headers, files=files).write(cache)
    return digest


def _headers(inventory: Inventory) -> str:
    entries = sorted([t.name, t.dtype, list(t.shape), str(t.path.resolve()), t.start] for t in inventory.stored)
    return digest_json({"config": inventory.declared_config, "tensors": entries})


def _files(inventory: Inventory) -> list[_FileIdentity]:
    found = []
    for path in sorted({t.path.resolve() for t in inventory.stored}):
        status = path.stat()
        found.append(
            _FileIdentity(
                path=str(path),
                size=status.st_size,
                inode=status.st_ino,
                modified_ns=status.st_mtime_ns,
                changed_ns=status.st_ctime_ns,
            )
        )
    return found
